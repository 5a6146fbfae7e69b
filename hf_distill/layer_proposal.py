"""A layer mapping read off the data: which teacher layer does each student layer resemble?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.activations import token_mask
from hf_distill.heads import forward_inputs, in_eval_mode
from hf_distill.mapping import STRATEGIES, LayerMapping, layers_of
from hf_distill.similarity import debiased_cka
from hf_distill.teachers import is_no_input

_ALIKE = 0.02  # teacher layers whose similarities differ by less are called alike


@dataclass(frozen=True)
class LayerProposal:
    """A proposed mapping, what it rests on, and (by `print`) why.

    Attributes:
        mapping: Every student block on one teacher block, in increasing order.
        similarity: (S + 1, T + 1), debiased linear CKA of every two hidden states; index 0 is the embedding output.
        positions: How many tokens (or patches) were compared.
    """

    mapping: LayerMapping
    similarity: Tensor
    positions: int

    def mean_similarity(self, mapping: LayerMapping) -> float:
        """The mean similarity of the pairs that a mapping makes for these two models."""
        pairs = mapping.resolve(len(self.similarity) - 1, self.similarity.shape[1] - 1)
        return sum(self.similarity[s, list(layers_of(t))].mean().item() for s, t in pairs) / len(pairs)

    def __str__(self) -> str:
        lines = [f"Similarity of hidden states over {self.positions} positions (debiased linear CKA, at most 1):"]
        for student, teacher in self.mapping.explicit:
            lines.append(self._line(student, layers_of(teacher)[0]))
        named = {"proposed": self.mapping, **{name: LayerMapping.parse(name) for name in STRATEGIES}}
        means = ", ".join(f"{name} {self.mean_similarity(mapping):.2f}" for name, mapping in named.items())
        return "\n".join([*lines, f"Mean over the pairs: {means}."])

    def _line(self, student: int, teacher: int) -> str:
        row = self.similarity[student, 1:]
        best = int(row.argmax()) + 1
        line = f"  student layer {student} <- teacher layer {teacher}: {row[teacher - 1].item():.2f}"
        if best != teacher:
            line += f"; layer {best} is more alike ({row.max().item():.2f}), but pairs must be in order"
        if (row.max() - row.min()).item() < _ALIKE:
            line += f"; all teacher layers are alike here ({row.min().item():.2f} or more), so this says little"
        return line


@torch.no_grad()
def propose_layer_mapping(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    teacher_batches: Iterable[Mapping[str, Any]] | None = None,
    max_positions: int = 1024,
) -> LayerProposal:
    """Pair every student block with the teacher block that it resembles most, in order, on a few batches.

    Resemblance is linear CKA (Kornblith et al., 2019) of the hidden states at real tokens, debiased; among all
    strictly increasing pairings the one with the largest sum is taken. It tells where the two models compute alike
    *now*, so it is for a student that was pre-trained or cut from a teacher: one with random weights resembles the
    layers near the embeddings everywhere.

    Args:
        student: The student, a Transformers model.
        teacher: The teacher; it sees the same batches.
        batches: A few collated batches, for example the first of a data loader. Labels are left out.
        teacher_batches: The same rows as the teacher reads them, if it has a tokenizer of its own. Then the mean of
            each row's tokens is compared, and a row is a position.
        max_positions: How many tokens or patches are compared, spread evenly over the batches; memory grows with
            the square.

    Raises:
        ValueError: If there is no batch, the student has more blocks, or positions differ.

    >>> from hf_distill.testing import tiny_task
    >>> task = tiny_task("token")
    >>> print(propose_layer_mapping(task.student, task.teacher, [task.collate(task.rows)]).mapping.strategy)
    pairs
    """
    batches = list(batches)
    if not batches:
        raise ValueError("propose_layer_mapping needs at least one batch, got none.")
    per_batch, read = max(1, max_positions // len(batches)), _positions if teacher_batches is None else _row_means
    ours = _states(student, batches, per_batch, read)
    theirs = _states(teacher, batches if teacher_batches is None else list(teacher_batches), per_batch, read)
    if len(ours) > len(theirs):
        raise ValueError(
            f"The student has {len(ours) - 1} layers and the teacher {len(theirs) - 1}: pairs in order need a student "
            "with no more layers than the teacher. Pass explicit pairs instead, for example {1: 1}."
        )
    if len(ours[0]) != len(theirs[0]):
        raise ValueError(
            f"The student has {len(ours[0])} positions in these batches, the teacher {len(theirs[0])}: their hidden "
            "states do not describe the same tokens or patches."
        )
    similarity = debiased_cka(ours, theirs)
    return LayerProposal(LayerMapping.pairs(_best_in_order(similarity[1:, 1:])), similarity, len(ours[0]))


def _states(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    per_batch: int,
    read: Callable[[Tensor, Tensor | None], Tensor],
) -> list[Tensor]:
    """Every hidden state at the chosen positions of all batches. Shape: L + 1 times (N, H)."""
    chosen: list[list[Tensor]] = []
    with in_eval_mode(model):
        for batch in batches:
            inputs = forward_inputs(model, {key: value for key, value in batch.items() if not is_no_input(key)})
            mask = token_mask(inputs)
            returned = model(**inputs, output_hidden_states=True).get("hidden_states")
            if not returned:
                name = type(model).__name__
                raise ValueError(f"{name} returns no hidden states to compare. Write the pairs yourself.")
            states = [read(h, mask) for h in returned]
            spread = torch.linspace(0, len(states[0]) - 1, min(per_batch, len(states[0])), device=states[0].device)
            chosen.append([h[spread.long()].float().cpu() for h in states])
    return [torch.cat(parts) for parts in zip(*chosen, strict=True)]


def _positions(state: Tensor, mask: Tensor | None) -> Tensor:
    if state.ndim != 3 or (mask is not None and mask.shape != state.shape[:2]):
        raise ValueError(
            f"propose_layer_mapping compares sequences of one length, got a hidden state of shape "
            f"{tuple(state.shape)}. Write the pairs yourself."
        )
    return state.flatten(0, 1) if mask is None else state[mask]


def _row_means(state: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each row's real tokens. Shape: (B, T, H) -> (B, H)."""
    _positions(state, mask)  # refuses what has no tokens
    weights = torch.ones(state.shape[:2], device=state.device) if mask is None else mask.float()
    return torch.einsum("bth,bt->bh", state.float(), weights / weights.sum(1, keepdim=True).clamp(min=1))


def _best_in_order(similarity: Tensor) -> dict[int, int]:
    """The strictly increasing pairing of all rows with columns whose sum is largest, by dynamic programming.

    >>> _best_in_order(torch.tensor([[0.1, 0.9, 0.0], [0.0, 1.0, 0.7]]))
    {1: 2, 2: 3}
    """
    rows, columns = similarity.shape
    value = similarity.tolist()
    # best[s][t]: the largest sum of the first s rows that uses the first t columns only.
    best = [[0.0] * (columns + 1)] + [[float("-inf")] * (columns + 1) for _ in range(rows)]
    for s in range(1, rows + 1):
        for t in range(s, columns + 1):
            best[s][t] = max(best[s][t - 1], best[s - 1][t - 1] + value[s - 1][t - 1])
    pairs, t = {}, columns
    for s in range(rows, 0, -1):
        while best[s][t] == best[s][t - 1]:
            t -= 1
        pairs[s], t = t, t - 1
    return dict(sorted(pairs.items()))
