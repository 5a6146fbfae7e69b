"""Soft targets that were stored beside the data, in the column `teacher_logits`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.activations import Head

TEACHER_LOGITS = "teacher_logits"
# Columns of a batch that no model's forward is given: the losses read them.
NOT_INPUTS = frozenset({"labels", "label", "label_ids", "shift_labels", "num_items_in_batch", TEACHER_LOGITS})


class TeacherLogitsCollator:
    """Wraps a data collator: batches the `teacher_logits` column, everything else is left to the wrapped collator.

    A row's entry is what the teacher returned for it: (V,) for one answer a row, (T, V) for token tasks and language
    models, (2, T) for question answering (start, end). Rows of different length are padded like the wrapped collator
    padded their tokens.

    Args:
        collator: The collator for all other columns.
        head: The student's head; says which dimension of a row is its length.
        padding_side: `"right"` or `"left"`, where the tokenizer pads.
    """

    def __init__(
        self, collator: Callable[[list[Any]], dict[str, Any]], head: Head, padding_side: str = "right"
    ) -> None:
        self.collator = collator
        self.head = head
        self.padding_side = padding_side

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        if not (features and isinstance(features[0], Mapping) and TEACHER_LOGITS in features[0]):
            return self.collator(features)
        missing = sum(TEACHER_LOGITS not in feature for feature in features)
        if missing:
            raise ValueError(
                f"{missing} of {len(features)} rows lack the column {TEACHER_LOGITS!r} that the others have."
            )
        logits = [torch.as_tensor(feature[TEACHER_LOGITS], dtype=torch.float32) for feature in features]
        batch = self.collator([{k: v for k, v in feature.items() if k != TEACHER_LOGITS} for feature in features])
        batch[TEACHER_LOGITS] = torch.stack([self._pad(row, batch) for row in logits])
        return batch

    def _pad(self, row: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(T, V) or (2, T) to the batch's length; (V,) as it is."""
        if self.head.kind == "rows" or "input_ids" not in batch:
            return row
        is_span = self.head.kind == "span"
        length = batch["input_ids"].shape[-1]
        missing = length - (row.shape[1] if is_span else row.shape[0])
        if missing < 0:
            raise ValueError(
                f"A row of {TEACHER_LOGITS!r} describes {length - missing} positions, but its batch has only "
                f"{length} tokens: it was made from longer inputs. Make it again from the dataset that is trained on."
            )
        padding = (missing, 0) if self.padding_side == "left" else (0, missing)
        return F.pad(row, padding if is_span else (0, 0, *padding))
