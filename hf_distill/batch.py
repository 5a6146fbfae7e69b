"""What a batch says about its positions, and the only reducer of the package.

A loss computes one value a position; `Batch.mean` sums the positions that count and divides by how many there are in
the whole accumulation window and on all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hf_distill.activations import TEACHER_POSITIONS, Activations, Head, token_mask
from hf_distill.top_k import TopKLogits
from hf_distill.unprojected import first_classes, materialised

IGNORED = -100  # transformers' label for "no answer here"
COUNTED = ("labels", "predictions", "all_predictions", "tokens", "rows")
Over = Literal["labels", "predictions", "all_predictions", "tokens", "rows"]


@dataclass(frozen=True)
class Batch:
    """Labels and masks of one batch, shaped like the positions of the logits, and the counts that means divide by.

    Attributes:
        problem: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        labels: Hard labels at each position, or `None`.
        masks: For each way of counting the positions that count. `"labels"` have a hard label; `"predictions"` are
            compared with soft targets (the labelled positions, or all real ones where the batch has no labels);
            `"all_predictions"` are all real ones; `"tokens"` are the real tokens of the hidden states (left out for
            inputs without a token dimension, whose positions all count); `"teacher_tokens"` are those of a teacher
            with a tokenizer of its own; `"rows"` are the rows.
        totals: The denominators: how many positions count in the accumulation window, on all processes.
    """

    problem: str
    labels: Tensor | None
    masks: Mapping[str, Tensor]
    totals: Mapping[str, Tensor]
    has_unused_mask: bool = False

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], head: Head) -> Batch:
        """Read labels and masks out of a model's inputs. Its totals are those of the batch alone."""
        labels = _labels(inputs, head)
        problem = head.problem(labels)
        rows = _first_tensor(inputs).shape[0]
        device = _first_tensor(inputs).device
        tokens = token_mask(inputs)
        if head.kind == "rows":
            labels, labelled, everything = _rows_masks(labels, problem, head.num_labels, rows, device)
        elif head.kind == "span":
            everything = torch.ones(rows, 2, dtype=torch.bool, device=device)
            labelled = None if labels is None else labels != IGNORED
        else:
            everything = _predicted_tokens(inputs, head, tokens)
            labelled = None if labels is None else labels != IGNORED
        compared = everything
        if head.kind == "tokens" and TEACHER_POSITIONS in inputs:
            compared = everything & (inputs[TEACHER_POSITIONS] >= 0)
        masks = {
            "labels": torch.zeros_like(everything) if labelled is None else labelled,
            "predictions": compared if labelled is None or head.kind in ("rows", "span") else labelled & compared,
            "all_predictions": compared,
            "rows": torch.ones(rows, dtype=torch.bool, device=device),
        }
        if tokens is not None:
            masks["tokens"] = tokens
        if "teacher_attention_mask" in inputs:
            masks["teacher_tokens"] = inputs["teacher_attention_mask"].bool()
        unused = tokens is None and any(key in inputs for key in ("attention_mask", "pixel_mask"))
        return cls(problem, labels, masks, _totals(masks), unused)

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        return len(self.masks["rows"])

    def counts(self) -> Tensor:
        """How many positions count, in the order of `COUNTED`. Shape: (5,)."""
        return torch.stack([self.totals[name] for name in COUNTED])

    def with_counts(self, counts: Tensor) -> Batch:
        """The same batch, its means divided by the counts of a larger window."""
        return replace(self, totals=dict(zip(COUNTED, counts, strict=True)))

    def first_rows(self, rows: int) -> Batch:
        """The same batch, of which only the first rows count."""
        if rows == self.rows:
            return self
        counts = torch.arange(self.rows, device=self.masks["rows"].device) < rows
        masks = {
            # Multiple choice has several rows of tokens for each row of the batch.
            name: mask & counts.repeat_interleave(len(mask) // self.rows).reshape(-1, *[1] * (mask.ndim - 1))
            for name, mask in self.masks.items()
        }
        return replace(self, masks=masks, totals=_totals(masks))

    def of_teacher(self) -> Batch:
        """The same batch, its tokens those of the teacher where it reads an encoding of its own."""
        if "teacher_tokens" not in self.masks:
            return self
        return replace(self, masks={**self.masks, "tokens": self.masks["teacher_tokens"]})

    def select(self, x: Any, over: Over = "predictions") -> Any:
        """Only the positions that count. Select *before* computing: a masked NaN multiplied by 0 still poisons
        gradients.

        Shape:
            (B, T, ...) -> (N, ...).
        """
        mask = self._mask(over)
        if mask is None:
            return x.flatten(0, 1)
        _require_same_positions(x, mask, over)
        # A large chunk of logits is not worth copying.
        return x if mask.ndim == 1 and bool(mask.all()) else x[mask]

    def positions(self, overs: Sequence[Over], logits: Any) -> tuple[Tensor, ...]:
        """Where any of several ways of counting logits has a position that counts, one index tensor a dimension.

        Raises:
            ValueError: If the logits are about other positions.
        """
        for over in overs:
            _require_same_positions(logits, self.masks[over], over)
        return torch.stack([self.masks[over] for over in overs]).any(0).nonzero(as_tuple=True)

    def part(self, positions: tuple[Tensor, ...]) -> Batch:
        """The same batch at some positions of the logits alone, its means divided by the same counts."""
        masks = {name: self.masks[name][positions] for name in ("labels", "predictions", "all_predictions")}
        return replace(self, labels=None if self.labels is None else self.labels[positions], masks=masks)

    def first_token(self, x: Tensor) -> Tensor:
        """The first real token of every sequence that has one, wherever padding lies; position 0 without tokens.

        Shape:
            (B, T, ...) -> (N, ...).
        """
        mask = self._mask("tokens")
        if mask is None:
            return x[self.masks["rows"], 0]
        _require_same_positions(x, mask, "tokens")
        return x[mask & (mask.cumsum(-1) == 1)]

    def mean_of_tokens(self, x: Tensor) -> Tensor:
        """The mean over the real tokens of every sequence that has one.

        Shape:
            (B, T, H) -> (N, H).
        """
        mask = self._mask("tokens")
        if mask is None:
            return x[self.masks["rows"]].mean(1)
        _require_same_positions(x, mask, "tokens")
        sums = x.masked_fill(~mask[..., None], 0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
        counts = mask.sum(-1)
        return sums[counts > 0] / counts[counts > 0, None]

    def tokens_of_row(self, length: int) -> Tensor:
        """For each real token how many real tokens its row has. Shape: (N,); (1,), `length` for all, where no token is
        masked.
        """
        mask = self._mask("tokens")
        if mask is None:
            return torch.full((1,), length, device=self.masks["rows"].device)
        return mask.sum(-1, keepdim=True).expand_as(mask)[mask]

    def predictions(
        self, student: Activations, teacher: Activations, over: Over = "predictions"
    ) -> tuple[Tensor, Tensor]:
        """Both models' logits at the positions that count, over the classes that both have.

        Where two vocabularies differ in padding the trainer hands over the teacher's logits without it; the student's
        are cut to match here, so that a loss on hard labels still sees all of them.

        Shape:
            (N, V) each; (N, 1) for multi-label heads and regression, whose outputs are positions of their own;
            (N, k + 1) where only the teacher's likeliest classes are known ([`TopKLogits`]).
        """
        if student.logits is None or teacher.logits is None:
            raise ValueError(
                "This loss compares logits, but does not ask for them in student_needs and teacher_needs."
            )
        ours = self.select(materialised(student.logits), over)
        if isinstance(teacher.logits, TopKLogits):
            known: TopKLogits = self.select(teacher.logits, over)
            return known.beside(materialised(first_classes(ours, known.vocabulary)))
        theirs = self.select(materialised(teacher.logits), over)
        if ours.ndim == 1:
            return ours[:, None], theirs[:, None]
        return materialised(first_classes(ours, theirs.shape[-1])), theirs

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
            per_row = values.reshape(self.rows, -1).mean(1)
            return per_row[self.masks["rows"]].sum() / self.totals[over].clamp(min=1)
        if values.shape == mask.shape:
            values = values[mask]
        elif values.ndim != 1:
            raise ValueError(
                f"Batch.mean(over={over!r}) got values of shape {tuple(values.shape)}, but needs one value a "
                f"position, {tuple(mask.shape)}, or one for each position kept by Batch.select."
            )
        return values.sum() / self.totals[over].clamp(min=1)

    def mean_of_texts(self, values: Tensor) -> Tensor:
        """The same over rows, of a value for each sequence that `first_token` or `mean_of_tokens` kept: those of a
        row, several in multiple choice, are averaged.

        Shape:
            (N,) -> ().
        """
        mask = self.masks.get("tokens")
        texts_of_row = 1 if mask is None else len(mask) // self.rows
        return values.sum() / (texts_of_row * self.totals["rows"]).clamp(min=1)

    def _mask(self, over: Over) -> Tensor | None:
        if over not in COUNTED:
            raise ValueError(f"`over` must be one of {COUNTED}, got {over!r}.")
        if over == "tokens" and self.has_unused_mask:
            raise ValueError(
                "A hidden-state loss needs to know which positions are padding, but this model's attention_mask "
                "does not describe its hidden states (audio or image features). Drop the hidden-state loss, or pad "
                "nothing and leave the mask out of the batches (return_attention_mask=False, or in the collator)."
            )
        return self.masks.get(over)


def _require_same_positions(x: Any, mask: Tensor, over: Over) -> None:
    if x.shape[: mask.ndim] != mask.shape:
        raise ValueError(
            f"Batch.select(over={over!r}) got a tensor of shape {tuple(x.shape)} for a mask of shape "
            f"{tuple(mask.shape)}: the model's outputs and the batch's labels or attention mask do not describe "
            "the same positions. (PEFT's prompt tuning and p-tuning put tokens in front, which only a student with "
            "one answer a row may have; LayoutLMv3 and its like put image patches behind the text. Drop the losses on "
            "layers.)"
        )


def _totals(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: masks.get(name, masks["rows"]).sum() for name in COUNTED}


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError(f"The batch holds no tensor, only {sorted(inputs)}. Check the data collator.")


def _labels(inputs: Mapping[str, Any], head: Head) -> Tensor | None:
    """Hard labels shaped like the positions of `Head.at_positions`, or None."""
    if head.kind == "span":
        if inputs.get("start_positions") is None or inputs.get("end_positions") is None:
            return None
        ends = torch.stack([inputs["start_positions"].flatten(), inputs["end_positions"].flatten()], dim=1)  # (B, 2)
        length = _first_tensor({"ids": inputs.get("input_ids", inputs.get("inputs_embeds"))}).shape[1]
        # Outside the row, padding too: no answer. Transformers takes one before it for the first token.
        ends = ends.masked_fill((ends < 0) | (ends >= length), IGNORED)
        tokens = token_mask(inputs)
        return ends if tokens is None else ends.masked_fill(~tokens.gather(1, ends.clamp(min=0)), IGNORED)
    if head.kind == "causal_lm" and inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    return labels[:, 1:] if head.kind == "causal_lm" and labels is not None else labels


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
                f"Got labels of shape {tuple(labels.shape)} for {rows} rows with one class each. For several labels "
                "a row give them as floats, or set config.problem_type='multi_label_classification'."
            )
        if labels is not None and labels.is_floating_point():
            raise ValueError(f"Got labels of {labels.dtype} for one class a row. Give the classes' numbers as int64.")
        labels = None if labels is None else labels.reshape(rows)
        return labels, None if labels is None else labels != IGNORED, everything
    everything = torch.ones(rows, num_labels, dtype=torch.bool, device=device)
    if labels is None:
        return None, None, everything
    if labels.numel() != rows * num_labels:
        raise ValueError(
            f"Got labels of {labels.dtype} and shape {tuple(labels.shape)} for {rows} rows with {num_labels} outputs "
            f"({problem}). Give a number for each output, or for one class a row the classes' numbers as int64."
        )
    labels = labels.reshape(rows, num_labels)
    missing = torch.isnan(labels) if problem == "regression" else labels == IGNORED  # -100 is a fine regression target
    return labels, ~missing, everything
