"""Token classification and question answering for a student and a teacher that do not share a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_distill.activations import TEACHER_POSITIONS
from hf_distill.batch import IGNORED
from hf_distill.transfer.two_tokenizers import TwoTokenizers

NOWHERE = -1  # a word or a character that the other model has no token of


class WordAlignedCollator(TwoTokenizers):
    """Token classification: the teacher's answer about a word's first token is the target at the student's.

    Pass it as `data_collator` with a dataset of words and one label a word; both models then are supervised, as usual,
    at the first token of each word. Words that truncation has left the teacher without are learned from their labels
    alone. Only losses on logits can be used.

    Args:
        tokenizer: The student's; a fast one.
        teacher_tokenizer: The teacher's; a fast one. Byte-level tokenizers such as RoBERTa's need
            `add_prefix_space=True` to take words.
        words_column: A column of lists of words; a text instead is split at white space.
        labels_column: A column of lists of classes, one a word; a batch none of whose rows have it is unlabelled.
        max_length: Tokens that the student reads; by default what its tokenizer allows.
        teacher_max_length: Tokens that the teacher reads.

    Raises:
        ValueError: If a tokenizer is not fast, a row has no words, or not one label a word.

    Returns:
        A batch with the student's encoding, `labels` (B, T), the teacher's encoding under names that start with
        `teacher_`, and `teacher_positions` (B, T): at each first token of a word where the teacher's is, else -1.
    """

    aligns = "tokens"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        words_column: str = "tokens",
        labels_column: str = "labels",
        max_length: int | None = None,
        teacher_max_length: int | None = None,
    ) -> None:
        super().__init__(tokenizer, teacher_tokenizer, [words_column, labels_column], max_length, teacher_max_length)
        self.words_column, self.labels_column = words_column, labels_column
        _require_fast(tokenizer, teacher_tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self.require_columns(rows, [self.words_column])
        texts = [row[self.words_column] for row in rows]
        words = [text.split() if isinstance(text, str) else list(text) for text in texts]
        batch, ours, theirs = self.encode_both([words], is_split_into_words=True)
        positions = torch.full(ours["input_ids"].shape, NOWHERE)
        labels = torch.full_like(positions, IGNORED)
        for number, row in enumerate(rows):
            known, classes = _first_tokens(theirs, number), row.get(self.labels_column)
            if classes is not None and len(classes) != len(words[number]):
                raise ValueError(
                    f"A row has {len(words[number])} words and {len(classes)} labels in {self.labels_column!r}. Each "
                    "word needs one."
                )
            for word, token in _first_tokens(ours, number).items():
                positions[number, token] = known.get(word, NOWHERE)
                if classes is not None:
                    labels[number, token] = classes[word]
        if any(row.get(self.labels_column) is not None for row in rows):
            batch["labels"] = labels
        return {**batch, TEACHER_POSITIONS: positions}


class SpanAlignedCollator(TwoTokenizers):
    """Question answering: the teacher's distributions over its tokens become distributions over the student's.

    A token's probability of being the start belongs to its first character, that of being the end to its last one; it
    goes to the student's token which holds that character, and adds up there. No answer (the first special token) is
    no answer for both. Pass it as `data_collator` with a dataset like SQuAD; contexts are truncated, not cut into
    windows, and answers beyond the student's part of the context are not learned from labels.

    Args:
        tokenizer: The student's; a fast one.
        teacher_tokenizer: The teacher's; a fast one.
        question_column: A column of texts.
        context_column: A column of texts.
        answers_column: A column of `{"text": [...], "answer_start": [...]}`, of which the first is taken; empty lists
            mean that there is no answer. A batch none of whose rows have it is unlabelled.
        max_length: Tokens that the student reads; by default what its tokenizer allows.
        teacher_max_length: Tokens that the teacher reads.

    Raises:
        ValueError: If a tokenizer is not fast or has no CLS token, or a row has no question or context.

    Returns:
        A batch with the student's encoding, `start_positions` and `end_positions` (B,), the teacher's encoding under
        names that start with `teacher_`, and `teacher_positions` (B, 2, T_teacher): the student's token for each
        token of the teacher, as the start and as the end, -1 where there is none.
    """

    aligns = "span"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        max_length: int | None = None,
        teacher_max_length: int | None = None,
    ) -> None:
        columns = [question_column, context_column, answers_column]
        super().__init__(tokenizer, teacher_tokenizer, columns, max_length, teacher_max_length)
        self.answers_column = answers_column
        _require_fast(tokenizer, teacher_tokenizer)
        for each in (tokenizer, teacher_tokenizer):
            if getattr(each, "cls_token_id", None) is None:
                raise ValueError(
                    f"{type(each).__name__} has no CLS token, which stands for no answer. Take an encoder's tokenizer."
                )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        asked = self.text_columns[:2]
        self.require_columns(rows, asked)
        texts = [[row[name] for row in rows] for name in asked]
        batch, ours, theirs = self.encode_both(texts, truncation="only_second")
        first = [row.tolist().index(self.tokenizer.cls_token_id) for row in ours["input_ids"]]
        positions = torch.full((len(rows), 2, theirs["input_ids"].shape[1]), NOWHERE)
        for number in range(len(rows)):
            own = [text[number] for text in texts]
            moved = self._moved(ours, theirs, number, own, first[number])
            positions[number, :, : len(moved)] = torch.tensor(moved).T
        if any(row.get(self.answers_column) is not None for row in rows):
            ends = [
                _answer_tokens(ours, number, row.get(self.answers_column), first[number])
                for number, row in enumerate(rows)
            ]
            batch["start_positions"], batch["end_positions"] = torch.tensor(ends).unbind(1)
        return {**batch, TEACHER_POSITIONS: positions}

    def _moved(self, ours: Any, theirs: Any, number: int, texts: list[str], no_answer: int) -> list[tuple[int, int]]:
        """For each token of the teacher the student's token of its first and of its last character."""
        encoding, found = theirs.encodings[number], []
        for token, (start, end), part in zip(encoding.ids, encoding.offsets, encoding.sequence_ids, strict=True):
            if part is None:
                place = no_answer if token == self.teacher_tokenizer.cls_token_id else NOWHERE
                found.append((place, place))
                continue
            piece = texts[part][start:end]  # byte-level tokenizers may count the space before a word
            first, last = start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip()) - 1
            places = [ours.char_to_token(number, char, part) for char in (first, last)] if piece.strip() else [None]
            start_token, end_token = (NOWHERE if place is None else place for place in (places[0], places[-1]))
            found.append((start_token, end_token))
        return found


def _answer_tokens(encoded: Any, number: int, answers: Any, no_answer: int) -> tuple[int, int]:
    """First and last token of the first answer; -100 where it is unknown or truncated away."""
    if answers is None:
        return IGNORED, IGNORED
    if not len(answers["answer_start"]):
        return no_answer, no_answer
    start, text = answers["answer_start"][0], answers["text"][0]
    ends = [encoded.char_to_token(number, char, 1) for char in (start, start + len(text) - 1)]
    return (IGNORED, IGNORED) if None in ends else (ends[0], ends[1])


def _first_tokens(encoded: Any, number: int) -> dict[int, int]:
    """Word -> its first token in a row."""
    first: dict[int, int] = {}
    for token, word in enumerate(encoded.word_ids(number)):
        if word is not None:
            first.setdefault(word, token)
    return first


def _require_fast(*tokenizers: Any) -> None:
    for tokenizer in tokenizers:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell which characters its tokens are of. Use a fast tokenizer."
            )
