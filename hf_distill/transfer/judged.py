"""What the teacher says about a transfer set, beside what the student reads of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from hf_distill.activations import Needs
from hf_distill.tasks import Task, longest_row
from hf_distill.teachers import EnsembleTeacher, OnlineTeacher
from hf_distill.teachers.cache import TeacherCache
from hf_distill.teachers.cached import TEACHER_LOGITS, column_names
from hf_distill.teachers.keeper import CacheKeeper
from hf_distill.teachers.rows import fetch


@dataclass
class Judgement:
    """The teacher's answers about some rows: a cache, and where in it each row is."""

    cache: TeacherCache
    positions: np.ndarray
    tokens: list[list[int | None]] | None = None  # of words: for each of the teacher's tokens its word

    def answers(self, row: int) -> dict[str, torch.Tensor]:
        """What the teacher said about one row, without padding."""
        where = [self.positions[row]]
        return {name: self.cache.store.read(where, name)[0] for name in column_names(self.cache.needs)}

    def confidence(self) -> np.ndarray:
        """The largest probability of each row's answer; of words their mean. Shape: (N,)."""
        logits = (self.cache.store.read([position], TEACHER_LOGITS)[0] for position in self.positions)
        return np.array([float(row.softmax(-1).amax(-1).mean()) for row in logits])


class JudgedRows(torch.utils.data.Dataset):
    """Rows as the student reads them, with the teacher's answers as [`DistillationTrainer`] takes them.

    The answers stay on disk and are read a row at a time.

    Args:
        rows: The student's encoding of the rows.
        judgement: What the teacher said about the same rows, in the same order.
        chosen: Which of them to have; all by default.
        words: For words: each row's words of the student's tokens. A token gets the answer about the first of the
            teacher's tokens of its word; one that stands for no word, that of the teacher's first or last token.
    """

    def __init__(
        self,
        rows: Any,
        judgement: Judgement,
        chosen: Sequence[int] | None = None,
        words: Sequence[Sequence[int | None]] | None = None,
    ) -> None:
        self.rows, self.judgement, self.words = rows, judgement, words
        self.chosen = range(len(rows)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def column_names(self) -> list[str]:
        """The columns of a row: the trainer keeps those of the teacher's answers."""
        return [*self.rows[0], *column_names(self.judgement.cache.needs)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.chosen[index]
        answers = self.judgement.answers(row)
        if self.words is not None and self.judgement.tokens is not None:
            places = torch.tensor(same_words(self.words[row], self.judgement.tokens[row]))
            answers = {name: answer[places] for name, answer in answers.items()}
        return {**self.rows[row], **answers}


def same_words(ours: Sequence[int | None], theirs: Sequence[int | None]) -> list[int]:
    """For each of our tokens the first of their tokens of the same word; for the others their first or last token.

    A word that they have cut off is answered by their last token.

    >>> same_words([None, 0, 0, 1, None], [None, 0, 1, 1, 1, None])
    [0, 1, 1, 2, 5]
    """
    first: dict[int | None, int] = {}
    for place, word in enumerate(theirs):
        first.setdefault(word, place)
    begin = next((k for k, word in enumerate(ours) if word is not None), len(ours))
    last = len(theirs) - 1
    return [(first.get(word, last) if word is not None else (0 if k < begin else last)) for k, word in enumerate(ours)]


def judge(
    rows: Any,
    teacher: nn.Module | OnlineTeacher | EnsembleTeacher,
    collate: Callable[[list[Any]], Any],
    needs: Needs,
    cache_dir: str | os.PathLike[str],
    *,
    state_positions: str = "all",
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Judgement:
    """Ask the teacher once about every row; what it said before is read, and an interrupted call goes on.

    Args:
        rows: As the teacher reads them, without labels.
        teacher: A model with a head, or several.
        collate: Makes a batch of rows.
        needs: Outputs to keep; hidden states by their indices.
        cache_dir: Where the answers are kept, as in `cache_teacher_outputs`.
        state_positions: Whose hidden states to keep: `"all"` tokens', or each row's `"first"`.
        batch_size: Rows at once.
        dtype: Precision of the teacher.
        progress: Whether to show a bar and a last line.
    """
    asked = teacher if isinstance(teacher, OnlineTeacher | EnsembleTeacher) else OnlineTeacher(teacher)
    keeper = CacheKeeper(str(cache_dir), asked, asked.head, [], dtype, state_positions=state_positions)
    cache = keeper.cache(needs)
    report = keeper.fill(
        rows, rows, collate, batch_size=batch_size, rank=0, world=1, progress=progress, barrier=lambda: None
    )
    if report is not None and progress:
        print(report.line(cache.folder))
    keeper.release()
    positions = [
        cache.store.find(cache.keys(collate(fetch(rows, range(start, min(start + 256, len(rows)))))))
        for start in range(0, len(rows), 256)
    ]
    return Judgement(cache, np.concatenate(positions) if positions else np.zeros(0, np.int64))


def word_ids(task: Task, dataset: Dataset, processing_class: Any, max_length: int | None) -> list[list[int | None]]:
    """For each row of words which word each token is of."""
    longest = longest_row(processing_class, max_length)
    found: list[list[int | None]] = []
    for start in range(0, len(dataset), 1000):
        words = dataset[start : start + 1000][task.inputs[0]]
        encoded = processing_class(words, truncation=True, max_length=longest, is_split_into_words=True)
        found += [encoded.word_ids(k) for k in range(len(words))]
    return found
