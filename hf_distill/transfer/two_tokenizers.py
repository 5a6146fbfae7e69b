"""A student and a teacher that do not share a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_distill.teachers.cached import TEACHER_PREFIX


class TwoTokenizersCollator:
    """Encodes text once for each model: for a RoBERTa teacher of a DistilBERT student, or a trimmed vocabulary.

    Pass it as `data_collator` with a dataset of texts. The teacher's encoding travels beside the student's, as
    `teacher_input_ids` and so on. Only answers about whole rows can be compared then (classification and regression of
    sequences): the tokens of one model are not those of the other.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: The teacher's.
        text_columns: The column of texts, or two whose texts are encoded as pairs.
        max_length: Tokens that the student reads; by default what its tokenizer allows.
        teacher_max_length: Tokens that the teacher reads.

    Raises:
        ValueError: If there are no or too many text columns, or a row lacks one.

    Returns:
        A batch with the student's encoding, `labels` if the rows have `label` or `labels`, and the teacher's encoding
        under names that start with `teacher_`. Shape: (B, T) each, with a T of its own for each model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        text_columns: Sequence[str] | str = "text",
        max_length: int | None = None,
        teacher_max_length: int | None = None,
    ) -> None:
        self.text_columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns must be one column of texts, or two of pairs; got {self.text_columns}.")
        self.tokenizer, self.teacher_tokenizer = tokenizer, teacher_tokenizer
        self.max_length, self.teacher_max_length = max_length, teacher_max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for name in self.text_columns:
            if any(name not in row for row in rows):
                raise ValueError(f"A row has no column {name!r} to encode, only {sorted(rows[0])}. Set text_columns.")
        texts = [[row[name] for row in rows] for name in self.text_columns]
        batch = self._encode(self.tokenizer, texts, self.max_length)
        teacher = self._encode(self.teacher_tokenizer, texts, self.teacher_max_length)
        batch |= {f"{TEACHER_PREFIX}{name}": value for name, value in teacher.items()}
        for name in ("label", "labels"):
            if all(row.get(name) is not None for row in rows):
                batch["labels"] = torch.tensor([row[name] for row in rows])
        return batch

    @staticmethod
    def _encode(tokenizer: Any, texts: list[list[str]], max_length: int | None) -> dict[str, Any]:
        return dict(tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))
