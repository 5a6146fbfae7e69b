"""What the teacher says about a transfer set, beside what the student reads of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_distill.activations import Needs
from hf_distill.functional import binary_logits
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

    def answers(self, row: int) -> dict[str, torch.Tensor]:
        """What the teacher said about one row, without padding."""
        where = [self.positions[row]]
        return {name: self.cache.store.read(where, name)[0] for name in column_names(self.cache.needs)}

    def confidence(self, several: bool = False) -> np.ndarray:
        """The largest probability of each row's answer; of words, or of `several` labels a row, their mean.

        Shape: (N,).
        """
        rows = (self.cache.store.read([position], TEACHER_LOGITS)[0] for position in self.positions)
        logits = (binary_logits(row) if several else row for row in rows)
        return np.array([float(row.softmax(-1).amax(-1).mean()) for row in logits])


class JudgedRows(torch.utils.data.Dataset):
    """Rows as the student reads them, with the teacher's answers as [`DistillationTrainer`] takes them.

    The answers stay on disk and are read a row at a time.

    Args:
        rows: The student's encoding of the rows.
        judgement: What the teacher said about the same rows, in the same order.
        chosen: Which of them to have; all by default.
        places: Where the models read different tokens: for each row, which of the teacher's tokens answers each of
            the student's ([`places`]). Answers about whole rows are not moved.
    """

    def __init__(
        self,
        rows: Any,
        judgement: Judgement,
        chosen: Sequence[int] | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.rows, self.judgement, self.places = rows, judgement, places
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
        if self.places is not None:
            places = torch.tensor(self.places[row])
            answers = {name: answer[places] if answer.ndim > 1 else answer for name, answer in answers.items()}
        return {**self.rows[row], **answers}


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
    device: torch.device | None = None,
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
        device: Where to ask a plain model; afterwards it is moved back to the CPU. By default where it is.
        progress: Whether to show a bar and a last line.
    """
    asked = teacher if isinstance(teacher, OnlineTeacher | EnsembleTeacher) else OnlineTeacher(teacher, device)
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
