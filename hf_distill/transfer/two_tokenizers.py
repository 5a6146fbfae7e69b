"""A student and a teacher that do not share a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_distill.teachers.cached import TEACHER_PREFIX


class TwoTokenizers:
    """Base of the collators that encode text once for each model.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: The teacher's.
        text_columns: The columns that must reach the collator.
        max_length: Tokens that the student reads; by default what its tokenizer allows.
        teacher_max_length: Tokens that the teacher reads.

    Attributes:
        aligns: The kind of head whose answers can be compared.
    """

    aligns: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        text_columns: list[str],
        max_length: int | None,
        teacher_max_length: int | None,
    ) -> None:
        self.tokenizer, self.teacher_tokenizer, self.text_columns = tokenizer, teacher_tokenizer, text_columns
        self.max_length, self.teacher_max_length = max_length, teacher_max_length

    def require_columns(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        """Refuse rows that lack a column."""
        for name in names:
            if any(name not in row for row in rows):
                raise ValueError(f"A row has no column {name!r} to encode, only {sorted(rows[0])}. Name its column.")

    def encode_both(self, texts: list[Any], **how: Any) -> tuple[dict[str, Any], Any, Any]:
        """The columns of a batch, and both encodings.

        Args:
            texts: One or two lists, each with an entry a row.
            how: More arguments of the tokenizers.
        """
        how = {"padding": True, "truncation": True, "return_tensors": "pt", **how}
        tokenizers: list[Any] = [self.tokenizer, self.teacher_tokenizer]
        lengths = (self.max_length, self.teacher_max_length)
        ours, theirs = (
            each(*texts, max_length=length, **how) for each, length in zip(tokenizers, lengths, strict=True)
        )
        return {**ours, **{f"{TEACHER_PREFIX}{name}": value for name, value in theirs.items()}}, ours, theirs


class TwoTokenizersCollator(TwoTokenizers):
    """Encodes text once for each model: for a RoBERTa teacher of a DistilBERT student, or a trimmed vocabulary.

    Pass it as `data_collator` with a dataset of texts. The teacher's encoding travels beside the student's, as
    `teacher_input_ids` and so on. Answers about whole rows can be compared (classification and regression of
    sequences), and hidden states that are pooled over each model's own tokens ([`PooledLoss`], [`LELPLoss`]). For
    answers about tokens see [`WordAlignedCollator`] and [`SpanAlignedCollator`].

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

    aligns = "rows"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        text_columns: Sequence[str] | str = "text",
        max_length: int | None = None,
        teacher_max_length: int | None = None,
    ) -> None:
        columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
        if len(columns) not in (1, 2):
            raise ValueError(f"text_columns must be one column of texts, or two of pairs; got {columns}.")
        super().__init__(tokenizer, teacher_tokenizer, columns, max_length, teacher_max_length)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self.require_columns(rows, self.text_columns)
        batch, _, _ = self.encode_both([[row[name] for row in rows] for name in self.text_columns])
        for name in ("label", "labels"):
            known = next((row[name] for row in rows if row.get(name) is not None), None)
            if known is not None:
                given = [row.get(name) for row in rows]
                batch["labels"] = torch.tensor([_unknown_like(known) if x is None else x for x in given])
        return batch


def _unknown_like(label: Any) -> Any:
    """What stands for a label that is not known: -100 beside classes, NaN beside the numbers of a regression.

    Raises:
        ValueError: Beside several labels or numbers a row, which do not tell which of the two they are.
    """
    if isinstance(label, Sequence):
        raise ValueError(
            "A batch has rows with several labels and rows without any. Fill in the missing ones: -100 for each "
            "class, or NaN for each number of a regression."
        )
    return math.nan if isinstance(label, float) else -100
