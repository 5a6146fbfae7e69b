"""The teacher caches of one run: opened for what its losses need, filled for what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.activations import Activations, Head, Needs, Shapes, token_mask
from hf_distill.teachers.base import LocalTeacher, Teacher
from hf_distill.teachers.cache import (
    Collate,
    TeacherCache,
    read_shapes,
    teacher_fingerprint,
    teacher_folder,
    write_shapes,
)
from hf_distill.teachers.cached import teacher_view
from hf_distill.teachers.fill import Filler, FillReport


class CacheKeeper:
    """Finds, opens and fills the caches of one teacher.

    Args:
        folder: `teacher_cache_dir`.
        teacher: Who is asked.
        head: Whose logits the losses compare.
        label_names: Inputs that are labels.
        dtype: Precision that the teacher is run in.
        state_dtype: Precision of stored hidden states and attention maps.
    """

    def __init__(
        self,
        folder: str,
        teacher: Teacher,
        head: Head,
        label_names: Sequence[str],
        dtype: torch.dtype = torch.float32,
        state_dtype: str = "float16",
    ) -> None:
        self.folder, self.teacher, self.head = folder, teacher, head
        self.label_names, self.dtype, self.state_dtype = list(label_names), dtype, state_dtype
        self.fingerprint = teacher_fingerprint(teacher, dtype)
        self.home = teacher_folder(folder, teacher.name, self.fingerprint)
        self._cache: TeacherCache | None = None
        self._filled: list[tuple[Any, Needs]] = []

    @property
    def needs(self) -> Needs:
        """What the open cache keeps."""
        return self._cache.needs if self._cache is not None else Needs()

    def cache(self, needs: Needs) -> TeacherCache:
        """Open the cache that keeps what is needed."""
        if self._cache is None or self._cache.needs != needs:
            self._cache = TeacherCache(
                self.folder, self.teacher, self.fingerprint, needs, self.head, self.label_names, self.state_dtype
            )
        return self._cache

    def fill(
        self,
        dataset: Any,
        rows: Any,
        collate: Collate,
        *,
        batch_size: int,
        rank: int,
        world: int,
        progress: bool,
        barrier: Callable[[], Any],
    ) -> FillReport | None:
        """Ask about all rows that the open cache does not know; with several processes each asks about its share.

        Args:
            dataset: Remembered: the second time nothing is looked at, and `None` returned.
            rows: The same dataset as it is read, without unused columns.
            collate: As in [`Filler`], like the others.
            batch_size: Rows at once.
            rank: This process.
            world: Number of processes.
            progress: Whether to show a bar.
            barrier: Waits for the other processes.
        """
        cache = self.cache(self.needs)
        if any(known is dataset and needs == cache.needs for known, needs in self._filled):
            return None
        filler = Filler(cache, self._ask, collate, self.label_names, batch_size, self.dtype, rank, world, progress)
        report = filler.fill(rows)
        if report.asked:
            cache.write_manifest(fingerprint=self.fingerprint, dtype=str(self.dtype), last_fill=vars(report))
        barrier()
        cache.store.refresh()
        self._filled.append((dataset, cache.needs))
        return report

    def shapes(self, needs: Needs, inputs: Mapping[str, Any]) -> Shapes | None:
        """The shapes of the teacher's layers for a batch, if they are known without asking."""
        rows, length = _size(inputs)
        return read_shapes(self.home, needs, rows, length)

    def remember_shapes(self, shapes: Shapes, inputs: Mapping[str, Any]) -> None:
        """Keep them for the next run."""
        write_shapes(self.home, shapes, _size(inputs)[1])

    def release(self) -> None:
        """The teacher has said all there is to say for now."""
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.release()

    def _ask(self, inputs: Mapping[str, Any], needs: Needs, dtype: torch.dtype) -> Activations:
        if isinstance(self.teacher, LocalTeacher):
            return self.teacher.answer(inputs, needs, dtype)
        return self.teacher(inputs, needs)


def _size(inputs: Mapping[str, Any]) -> tuple[int, int | None]:
    inputs = teacher_view(inputs)
    rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    tokens = token_mask(inputs)
    return rows, None if tokens is None else tokens.shape[-1]
