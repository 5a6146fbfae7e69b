"""What a loss asks for (`Needs`), what a model gave (`Activations`), and what the batch says about it (`Batch`).

`Batch.mean` is the only reducer of the package: a loss computes one value a position, `Batch.mean` sums the positions that
count and divides by how many there are in the whole accumulation window and on all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

IGNORED = -100  # transformers' label for "no answer here"
COUNTED = ("labels", "predictions", "all_predictions", "tokens", "rows")
Over = Literal["labels", "predictions", "all_predictions", "tokens", "rows"]

# Finite, so that a masked class times a zero probability is 0 and not NaN; small enough for exp() to be exactly 0, and
# representable in fp16.
_MASKED_LOGIT = -1e4


@dataclass(frozen=True)
class Needs:
    """Which outputs a loss reads: the logits, and hidden states (`True` for all, or their indices)."""

    logits: bool = False
    hidden_states: bool | tuple[int, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        if self.hidden_states is True or other.hidden_states is True:
            hidden_states: bool | tuple[int, ...] = True
        else:
            hidden_states = tuple(sorted({*(self.hidden_states or ()), *(other.hidden_states or ())}))
        return Needs(self.logits or other.logits, hidden_states)

    def __bool__(self) -> bool:
        return self.logits or bool(self.hidden_states)

    @classmethod
    def union(cls, needs: Iterable[Needs]) -> Needs:
        """Everything that any of several losses reads.

        >>> Needs.union([Needs(logits=True), Needs(hidden_states=(4, 1)), Needs(hidden_states=(4,))])
        Needs(logits=True, hidden_states=(1, 4))
        """
        united = cls()
        for need in needs:
            united = united | need
        return united

    def forward_arguments(self) -> dict[str, Any]:
        """The keyword arguments that make a Transformers model return what is needed, and no more."""
        if not self.hidden_states:
            return {}
        return {"output_hidden_states": True if self.hidden_states is True else list(self.hidden_states)}


@dataclass(frozen=True)
class Head:
    """What a model's output means: the task that its class was built for.

    Attributes:
        kind: `"rows"` (one answer a row: sequence, image, audio classification, regression), `"tokens"` (token
            classification), `"masked_lm"`, `"causal_lm"`, or `"span"` (extractive question answering).
        num_labels: Width of the logits; only read for `"rows"`.
        problem_type: Transformers' `config.problem_type`; `None` until labels decide.
        stack: Which stack the hidden states belong to.
    """

    kind: Literal["rows", "tokens", "masked_lm", "causal_lm", "span"]
    num_labels: int = 0
    problem_type: str | None = None
    stack: Literal["encoder", "decoder"] = "encoder"

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

    def logits(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        """A model's logits with one vector of classes at each position that can be supervised.

        Shape:
            rows: (B, V). tokens, masked_lm: (B, T, V). causal_lm: (B, T - 1, V), position i answers for token i + 1.
            span: (B, 2, T), start and end, with padding masked out of the classes.
        """
        if self.kind == "span" and "start_logits" in outputs:
            return _mask_padding(torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1), inputs)
        if "logits" not in outputs:
            raise ValueError(f"The model returned no logits to compare, only {sorted(outputs)}.")
        logits = outputs["logits"]
        if self.kind == "span":
            return _mask_padding(logits, inputs)
        if self.kind == "causal_lm" and "shift_labels" not in inputs:
            return logits[:, :-1]
        return logits


@dataclass
class Activations:
    """What one model returned for one batch.

    Attributes:
        logits: As described in [`Head.logits`].
        hidden_states: `hidden_states` index -> (B, T, H), only the requested ones.
        stack: `"encoder"` or `"decoder"`, the stack that `hidden_states` belong to.
    """

    logits: Tensor | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    stack: Literal["encoder", "decoder"] = "encoder"

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, Any], inputs: Mapping[str, Any], head: Head, needs: Needs) -> Activations:
        """Pick what is needed out of a Transformers model's output."""
        hidden_states = {}
        if needs.hidden_states:
            returned = outputs.get("hidden_states")
            if returned is None:
                raise ValueError(
                    "A loss needs hidden states, but the model returned none for output_hidden_states=True. "
                    "Drop the hidden-state loss, or use a model that returns them."
                )
            indices = range(len(returned)) if needs.hidden_states is True else needs.hidden_states
            hidden_states = {index: returned[index] for index in indices}
        logits = head.logits(outputs, inputs) if needs.logits else None
        return cls(logits, hidden_states, head.stack)

    def shapes(self) -> Shapes:
        """The shapes alone, for [`DistillationLoss.setup`]."""
        widths = tuple(tuple(self.hidden_states[index].shape) for index in sorted(self.hidden_states))
        return Shapes(None if self.logits is None else tuple(self.logits.shape), widths)


@dataclass(frozen=True)
class Shapes:
    """Shapes seen in one dry forward: of the logits, and of every hidden state in order (empty if none was asked for)."""

    logits: tuple[int, ...] | None = None
    hidden_states: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Labels and masks of one batch, shaped like the positions of the logits, and the counts that means divide by.

    Attributes:
        problem: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        labels: Hard labels at each position, or `None`.
        masks: For each way of counting the positions that count. `"labels"` have a hard label; `"predictions"` are compared
            with soft targets (the labelled positions, or all real ones where the batch has no labels);
            `"all_predictions"` are all real ones; `"tokens"` are the real tokens of the hidden states (`None` for inputs
            without a token dimension, whose positions all count); `"rows"` are the rows.
        totals: The denominators: how many positions count in the accumulation window, on all processes.
    """

    problem: str
    labels: Tensor | None
    masks: Mapping[str, Tensor | None]
    totals: Mapping[str, Tensor]
    has_unused_mask: bool = False

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], head: Head) -> Batch:
        """Read labels and masks out of a model's inputs. Its totals are those of the batch alone."""
        labels = _labels(inputs, head)
        problem = head.problem(labels)
        rows = _first_tensor(inputs).shape[0]
        device = _first_tensor(inputs).device
        tokens = _token_mask(inputs)
        if head.kind == "rows":
            labels, labelled, everything = _rows_masks(labels, problem, head.num_labels, rows, device)
        elif head.kind == "span":
            everything = torch.ones(rows, 2, dtype=torch.bool, device=device)
            labelled = None if labels is None else labels != IGNORED
        else:
            everything = _predicted_tokens(inputs, head, tokens)
            labelled = None if labels is None else labels != IGNORED
        masks = {
            "labels": torch.zeros_like(everything) if labelled is None else labelled,
            "predictions": everything if labelled is None or head.kind in ("rows", "span") else labelled,
            "all_predictions": everything,
            "tokens": tokens,
            "rows": torch.ones(rows, dtype=torch.bool, device=device),
        }
        totals = {name: (masks["rows"] if mask is None else mask).sum() for name, mask in masks.items()}
        unused = tokens is None and any(key in inputs for key in ("attention_mask", "pixel_mask"))
        return cls(problem, labels, masks, totals, unused)

    def counts(self) -> Tensor:
        """How many positions count, in the order of `COUNTED`. Shape: (5,)."""
        return torch.stack([self.totals[name] for name in COUNTED])

    def with_counts(self, counts: Tensor) -> Batch:
        """The same batch, its means divided by the counts of a larger window."""
        return replace(self, totals=dict(zip(COUNTED, counts, strict=True)))

    def select(self, x: Tensor, over: Over = "predictions") -> Tensor:
        """Only the positions that count. Select *before* computing: a masked NaN multiplied by 0 still poisons gradients.

        Shape:
            (B, T, ...) -> (N, ...).
        """
        mask = self._mask(over)
        if mask is None:
            return x.flatten(0, 1)
        if x.shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"Batch.select(over={over!r}) got a tensor of shape {tuple(x.shape)} for a mask of shape {tuple(mask.shape)}: the "
                "model's outputs and the batch's labels or attention mask do not describe the same positions."
            )
        return x[mask]

    def predictions(
        self, student: Activations, teacher: Activations, over: Over = "predictions"
    ) -> tuple[Tensor, Tensor]:
        """Both models' logits at the positions that count, over the classes that both have.

        Where two vocabularies differ in padding the trainer hands over the teacher's logits without it; the student's are cut
        to match here, so that a loss on hard labels still sees all of them.

        Shape:
            (N, V) each; (N,) for multi-label heads and regression.
        """
        if student.logits is None or teacher.logits is None:
            raise ValueError("This loss compares logits, but does not ask for them in student_needs and teacher_needs.")
        ours, theirs = self.select(student.logits, over), self.select(teacher.logits, over)
        return (ours if ours.ndim == 1 else ours[:, : theirs.shape[-1]]), theirs

    def mean(self, values: Tensor, over: Over = "predictions") -> Tensor:
        """Sum over the positions that count, divided by their number in the window: the only reduction there is.

        Args:
            values: One value a position, or a value for each position that [`Batch.select`] kept.
            over: Which positions count, see `masks`.

        Shape:
            (B, T) or (N,) -> ().
        """
        mask = self._mask(over)
        if mask is None:  # every row has the same number of positions: a mean over rows of means
            return values.reshape(self.masks["rows"].shape[0], -1).mean(1).sum() / self.totals[over].clamp(min=1)  # type: ignore[union-attr]
        if values.shape == mask.shape:
            values = values[mask]
        elif values.ndim != 1:
            raise ValueError(
                f"Batch.mean(over={over!r}) got values of shape {tuple(values.shape)}, but needs one value a position, "
                f"{tuple(mask.shape)}, or one for each position kept by Batch.select."
            )
        return values.sum() / self.totals[over].clamp(min=1)

    def _mask(self, over: Over) -> Tensor | None:
        if over not in COUNTED:
            raise ValueError(f"`over` must be one of {COUNTED}, got {over!r}.")
        if over == "tokens" and self.has_unused_mask:
            raise ValueError(
                "A hidden-state loss needs to know which positions are padding, but this model's attention_mask does not "
                "describe its hidden states (audio or image features). Drop the hidden-state loss, or use unpadded inputs."
            )
        return self.masks[over]


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError(f"The batch holds no tensor, only {sorted(inputs)}. Check the data collator.")


def _labels(inputs: Mapping[str, Any], head: Head) -> Tensor | None:
    """Hard labels shaped like the positions of `Head.logits`, or None."""
    if head.kind == "span":
        if inputs.get("start_positions") is None or inputs.get("end_positions") is None:
            return None
        ends = torch.stack([inputs["start_positions"].flatten(), inputs["end_positions"].flatten()], dim=1)  # (B, 2)
        length = _first_tensor({"ids": inputs.get("input_ids", inputs.get("inputs_embeds"))}).shape[1]
        return ends.masked_fill((ends < 0) | (ends >= length), IGNORED)  # outside the window: no answer, as in Transformers
    if head.kind == "causal_lm" and inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    return labels[:, 1:] if head.kind == "causal_lm" and labels is not None else labels


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
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


def _predicted_tokens(inputs: Mapping[str, Any], head: Head, tokens: Tensor | None) -> Tensor:
    """(B, T) or (B, T - 1): the positions whose prediction is about a real token, made from a real token."""
    if tokens is None:
        raise ValueError(f"A {head.kind} head needs input_ids or inputs_embeds in the batch, got {sorted(inputs)}.")
    if head.kind == "causal_lm" and "shift_labels" not in inputs:
        return tokens[:, 1:] & tokens[:, :-1]
    return tokens


def _rows_masks(
    labels: Tensor | None, problem: str, num_labels: int, rows: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Labels, their mask and the mask of all positions: (B,) for one class a row, else (B, num_labels)."""
    if problem == "single_label_classification":
        everything = torch.ones(rows, dtype=torch.bool, device=device)
        if labels is not None and labels.numel() != rows:
            raise ValueError(
                f"Got labels of shape {tuple(labels.shape)} for {rows} rows with one class each. For several labels a row give them "
                "as floats, or set config.problem_type='multi_label_classification'."
            )
        labels = None if labels is None else labels.reshape(rows)
        return labels, None if labels is None else labels != IGNORED, everything
    everything = torch.ones(rows, num_labels, dtype=torch.bool, device=device)
    if labels is None:
        return None, None, everything
    labels = labels.reshape(rows, num_labels)
    missing = torch.isnan(labels) if problem == "regression" else labels == IGNORED  # -100 is a fine regression target
    return labels, ~missing, everything


def _mask_padding(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    tokens = _token_mask(inputs)
    return logits if tokens is None else logits.masked_fill(~tokens[:, None, :], _MASKED_LOGIT)
