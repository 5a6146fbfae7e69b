"""What a loss asks for (`Needs`), what a model's output means (`Head`), and what it returned (`Activations`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hf_distill.unprojected import Logits

# Finite, so that a masked class times a zero probability is 0 and not NaN; small enough for exp() to be exactly 0, and
# representable in fp16.
MASKED_LOGIT = -1e4
# Where a batch says which tokens of a teacher with a tokenizer of its own stand for which of the student's.
TEACHER_POSITIONS = "teacher_positions"

TRAITS = (
    "rows", "tokens", "masked_lm", "causal_lm", "span",
    "single_label_classification", "multi_label_classification", "regression", "two_classes",
)  # fmt: skip
Indices = Literal[True] | tuple[int, ...]
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Needs:
    """Which outputs a loss reads: the logits, and of which layers (`True` for all, or their indices) the hidden
    states, the attention maps, and the queries, keys and values of attention.

    What has index `k` is of the block whose output is hidden state `k`; the first block is 1.
    """

    logits: bool = False
    hidden_states: Indices = ()
    attentions: Indices = ()
    qkv: Indices = ()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.logits or other.logits,
            _union(self.hidden_states, other.hidden_states),
            _union(self.attentions, other.attentions),
            _union(self.qkv, other.qkv),
        )

    def __bool__(self) -> bool:
        return self.logits or bool(self.hidden_states) or bool(self.attentions) or bool(self.qkv)

    def of_every_layer(self) -> Needs:
        """The same kinds of output, of all layers."""
        every: list[Indices] = [True if asked else () for asked in (self.hidden_states, self.attentions, self.qkv)]
        return Needs(self.logits, *every)

    @classmethod
    def union(cls, needs: Iterable[Needs]) -> Needs:
        """Everything that any of several losses reads.

        >>> Needs.union([Needs(logits=True), Needs(hidden_states=(4, 1)), Needs(hidden_states=(4,))])
        Needs(logits=True, hidden_states=(1, 4), attentions=(), qkv=())
        """
        united = cls()
        for need in needs:
            united = united | need
        return united

    def forward_arguments(self) -> dict[str, Any]:
        """The keyword arguments that make a Transformers model return what is needed, and no more."""
        arguments: dict[str, Any] = {}
        if self.hidden_states:
            # Releases that take no list take any for True; the indices are the same.
            arguments["output_hidden_states"] = True if self.hidden_states is True else list(self.hidden_states)
        if self.attentions:
            arguments["output_attentions"] = True
        return arguments

    def kinds(self) -> list[str]:
        """What is asked for, in words.

        >>> Needs(logits=True, attentions=(2,)).kinds()
        ['logits', 'attention maps']
        """
        asked = {
            "logits": self.logits, "hidden states": self.hidden_states, "attention maps": self.attentions,
            "queries, keys and values": self.qkv,
        }  # fmt: skip
        return [kind for kind, indices in asked.items() if indices]

    def output_names(self) -> set[str]:
        """What a model returns only because it was asked."""
        asked = {"hidden_states": self.hidden_states, "attentions": self.attentions}
        return {name for name, indices in asked.items() if indices}


def _union(ours: Indices, theirs: Indices) -> Indices:
    return True if ours is True or theirs is True else tuple(sorted({*ours, *theirs}))


@dataclass(frozen=True)
class Head:
    """What a model's output means: the task that its class was built for.

    Attributes:
        kind: `"rows"` (one answer a row: sequence, image, audio classification, regression), `"tokens"` (token
            classification), `"masked_lm"`, `"causal_lm"`, or `"span"` (extractive question answering).
        num_labels: Width of the logits; only read for `"rows"`.
        problem_type: Transformers' `config.problem_type`; `None` until labels decide.
        stack: Which stack the hidden states belong to: in a `"decoder"` a token sees none that follow it.
    """

    kind: Literal["rows", "tokens", "masked_lm", "causal_lm", "span"]
    num_labels: int = 0
    problem_type: str | None = None
    stack: Literal["encoder", "decoder"] = "encoder"

    @property
    def has_named_outputs(self) -> bool:
        """Whether its outputs are matched by their names; the single number of a regression has none to match."""
        return self.problem_type != "regression" or self.num_labels > 1

    def problem(self, labels: Tensor | None) -> str:
        """`config.problem_type` with Transformers' own rule where it is unset."""
        if self.kind != "rows":
            return "single_label_classification"
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1:
            return "regression"
        if labels is not None and labels.is_floating_point():
            return "multi_label_classification"
        return "single_label_classification"

    def traits(self, problem: str, classes: int | None = None) -> tuple[str, ...]:
        """What a loss may have no meaning for: the kind of head, the problem, and `"two_classes"` where there are two.

        >>> Head("tokens").traits("single_label_classification", classes=2)
        ('tokens', 'single_label_classification', 'two_classes')
        """
        two = classes == 2 and problem == "single_label_classification" and self.kind != "span"
        return (self.kind, problem, "two_classes") if two else (self.kind, problem)

    def answers(self, outputs: Mapping[str, Any]) -> Tensor:
        """A model's logits as it returns them.

        Shape:
            rows: (B, V). tokens, masked_lm, causal_lm: (B, T, V). span: (B, 2, T), start and end.
        """
        if self.kind == "span" and "start_logits" in outputs:
            return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
        if "logits" not in outputs:
            raise ValueError(f"The model returned no logits to compare, only {sorted(outputs)}.")
        return outputs["logits"]

    def at_positions(self, answers: Logits, inputs: Mapping[str, Any]) -> Logits:
        """Logits with one vector of classes at each position that can be supervised.

        Shape:
            As [`Head.answers`], but causal_lm: (B, T - 1, V), position i answers for token i + 1, unless the batch
            brings `shift_labels`. For spans padding is no possible answer.
        """
        if self.kind == "causal_lm" and "shift_labels" not in inputs:
            return answers[:, :-1]
        if self.kind == "span" and isinstance(answers, Tensor):
            tokens = token_mask(inputs)
            return answers if tokens is None else answers.masked_fill(~tokens[:, None, :], MASKED_LOGIT)
        return answers


@dataclass
class Activations:
    """What one model returned for one batch.

    Attributes:
        logits: As in [`Head.answers`] when a model or teacher returns them; the losses see [`Head.at_positions`], and
            tensors. On the way there those of a language model may be [`UnprojectedLogits`].
        hidden_states: `hidden_states` index -> (B, T, H), only the requested ones.
        attentions: Index of the block's output -> (B, A, T, T), rows are queries; only the requested ones.
        stack: `"encoder"` or `"decoder"`, the stack that `hidden_states` belong to.
        qkv: Index of the block's output -> its queries (B, A, T, D), keys and values (B, A or a divisor of it, T, D),
            as they enter attention; only the requested ones.
    """

    logits: Logits | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    attentions: Mapping[int, Tensor] = field(default_factory=dict)
    stack: Literal["encoder", "decoder"] = "encoder"
    qkv: Mapping[int, QKV] = field(default_factory=dict)

    @classmethod
    def from_outputs(
        cls, outputs: Mapping[str, Any], head: Head, needs: Needs, qkv: Mapping[int, QKV] | None = None
    ) -> Activations:
        """Pick what is needed out of a Transformers model's output, and of what was recorded while it ran.

        Raises:
            ValueError: If it is no mapping, or lacks what is needed.
        """
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"The model returned a {type(outputs).__name__}, whose parts have no names. Models do so "
                "where config.return_dict is False: set it to True."
            )
        return cls(
            head.answers(outputs) if needs.logits else None,
            _picked(outputs.get("hidden_states"), needs.hidden_states, "hidden states", first=0),
            _picked(outputs.get("attentions"), needs.attentions, "attention maps", first=1),
            head.stack,
            dict(qkv or {}),
        )

    def __or__(self, other: Activations) -> Activations:
        """Two parts of one answer; what both have is the left one's."""
        logits = self.logits if self.logits is not None else other.logits
        states = {**other.hidden_states, **self.hidden_states}
        maps, qkv = {**other.attentions, **self.attentions}, {**other.qkv, **self.qkv}
        return Activations(logits, states, maps, other.stack, qkv)

    def at_positions(self, head: Head, inputs: Mapping[str, Any]) -> Activations:
        """The same activations, their logits at the positions that can be supervised."""
        return self if self.logits is None else replace(self, logits=head.at_positions(self.logits, inputs))

    def shapes(self) -> Shapes:
        """The shapes alone, for [`DistillationLoss.setup`]."""
        states, maps = _shapes(self.hidden_states, first=0), _shapes(self.attentions, first=1)
        qkv = tuple(tuple(tuple(x.shape) for x in self.qkv[index]) for index in sorted(self.qkv))
        return Shapes(None if self.logits is None else tuple(self.logits.shape), states, maps, qkv)


@dataclass(frozen=True)
class Shapes:
    """Shapes seen in one dry forward: of the logits, and of every hidden state, attention map, and queries, keys and
    values, in order; `()` for what was not asked for.
    """

    logits: tuple[int, ...] | None = None
    hidden_states: tuple[tuple[int, ...], ...] = ()
    attentions: tuple[tuple[int, ...], ...] = ()
    qkv: tuple[tuple[tuple[int, ...], ...], ...] = ()


def _shapes(tensors: Mapping[int, Tensor], first: int) -> tuple[tuple[int, ...], ...]:
    indices = range(first, max(tensors, default=first - 1) + 1)
    return tuple(tuple(tensors[index].shape) if index in tensors else () for index in indices)


def _picked(returned: Any, indices: Indices, what: str, first: int) -> dict[int, Tensor]:
    if not indices:
        return {}
    if not returned:  # None, or the empty tuple that attention without maps returns
        raise ValueError(f"A loss needs {what}, but the model returned none. Drop that loss, or use another model.")
    wanted = range(first, len(returned) + first) if indices is True else indices
    return {index: returned[index - first] for index in wanted}


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """(B, T) real tokens; None where the input has no token dimension. Never guessed from the padding id."""
    ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embeddings is None:
        return None
    shape = ids.shape if ids is not None else embeddings.shape[:-1]  # type: ignore[union-attr]
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != shape:  # no mask, or one of pairs of positions: every token is real
        device = ids.device if ids is not None else embeddings.device  # type: ignore[union-attr]
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    return mask.bool().reshape(-1, shape[-1])  # multiple choice: (B, choices, T) runs as (B * choices, T)
