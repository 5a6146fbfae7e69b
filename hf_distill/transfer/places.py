"""Where in the teacher's encoding of a row each of the student's tokens is answered, whatever tokenizers read it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from hf_distill.tasks import Task, longest_row

Begin = tuple[int, int] | None  # which text of a pair, and the first character; of a special token nothing


def places(task: Task, dataset: Dataset, ours: Any, theirs: Any, max_length: int | None) -> list[list[int]] | None:
    """For each row the place of the teacher's token that answers each of the student's.

    A word is answered by the teacher's first token of it; a token of a text by the teacher's token that holds its
    first character. Special tokens are answered by the teacher's first or last token, and what it has cut off by its
    last one of that text.

    Args:
        task: Of texts or words.
        dataset: The rows as they are.
        ours: The student's tokenizer.
        theirs: The teacher's.
        max_length: Tokens that are read of a row.

    Returns:
        `None` if a tokenizer is not fast: then it cannot tell, but cannot be trimmed either, and both models read the
        same tokens.
    """
    if not (getattr(ours, "is_fast", False) and getattr(theirs, "is_fast", False)):
        return None
    if task.kind == "words":
        read, find = word_ids, same_words
    else:
        read, find = beginnings, same_characters  # type: ignore[assignment]
    both = (read(task, dataset, reader, max_length) for reader in (ours, theirs))
    return [find(our, their) for our, their in zip(*both, strict=True)]


def word_ids(task: Task, dataset: Dataset, processing_class: Any, max_length: int | None) -> list[list[int | None]]:
    """For each row of words which word each token is of."""
    longest = longest_row(processing_class, max_length)
    found: list[list[int | None]] = []
    for start in range(0, len(dataset), 1000):
        words = dataset[start : start + 1000][task.inputs[0]]
        encoded = processing_class(words, truncation=True, max_length=longest, is_split_into_words=True)
        found += [encoded.word_ids(k) for k in range(len(words))]
    return found


def beginnings(task: Task, dataset: Dataset, processing_class: Any, max_length: int | None) -> list[list[Begin]]:
    """For each row of texts where each token begins."""
    longest = longest_row(processing_class, max_length)
    found: list[list[Begin]] = []
    for start in range(0, len(dataset), 1000):
        some = dataset[start : start + 1000]
        texts = [some[name] for name in task.inputs]
        encoded = processing_class(*texts, truncation=True, max_length=longest, return_offsets_mapping=True)
        for k, offsets in enumerate(encoded["offset_mapping"]):
            sides = encoded.sequence_ids(k)
            found.append([None if s is None else (s, begin) for s, (begin, _) in zip(sides, offsets, strict=True)])
    return found


def same_words(ours: Sequence[int | None], theirs: Sequence[int | None]) -> list[int]:
    """For each of our tokens the first of their tokens of the same word; for the others their first or last token.

    A word that they have cut off is answered by their last token.

    >>> same_words([None, 0, 0, 1, None], [None, 0, 1, 1, 1, None])
    [0, 1, 1, 2, 5]
    """
    first: dict[int | None, int] = {}
    for place, word in enumerate(theirs):
        first.setdefault(word, place)
    begin, last = _number_before(ours), len(theirs) - 1
    return [(first.get(word, last) if word is not None else (0 if k < begin else last)) for k, word in enumerate(ours)]


def same_characters(ours: Sequence[Begin], theirs: Sequence[Begin]) -> list[int]:
    """For each of our tokens the last of their tokens that begins where it does or before, in the same text; for
    special tokens, and where they have none of that text, their first or last token.

    >>> same_characters([None, (0, 0), (0, 4), (0, 5), None], [None, (0, 0), (0, 2), (0, 5), None])
    [0, 1, 2, 3, 4]
    """
    known = [(begin, place) for place, begin in enumerate(theirs) if begin is not None]
    starts = [begin for begin, _ in known]
    begin, last = _number_before(ours), len(theirs) - 1
    found = []
    for k, where in enumerate(ours):
        if where is None:
            found.append(0 if k < begin else last)
            continue
        before = bisect_right(starts, where) - 1
        there = before >= 0 and starts[before][0] == where[0]
        found.append(known[before][1] if there else last)
    return found


def _number_before(ours: Sequence[Any]) -> int:
    """How many special tokens stand in front."""
    return next((k for k, what in enumerate(ours) if what is not None), len(ours))
