"""The teacher caches of one run: opened for what its losses need, filled for what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.activations import Activations, Head, Needs, Shapes, token_mask
from hf_distill.output_head import OutputHead, find_output_head, unprojected, without_head
from hf_distill.teachers.base import LocalTeacher, Teacher
from hf_distill.teachers.cache import Collate, TeacherCache, teacher_fingerprint, teacher_folder
from hf_distill.teachers.cached import teacher_view
from hf_distill.teachers.fill import Filler, FillReport
from hf_distill.teachers.kept_logits import KeptLogits, Over
from hf_distill.teachers.notes import HEAD, read_head, read_shapes, write_head, write_shapes
from hf_distill.teachers.online import OnlineTeacher
from hf_distill.teachers.placement import execution_device
from hf_distill.teachers.store import AnswerStore


class CacheKeeper:
    """Finds, opens and fills the caches of one teacher.

    Args:
        folder: `teacher_cache_dir`.
        teacher: Who is asked.
        head: Whose logits the losses compare.
        label_names: Inputs that are labels.
        dtype: Precision that the teacher is run in.
        state_dtype: Precision of stored hidden states, attention maps and log-probabilities.
        logits: What to keep of logits. `"auto"` keeps what the output head of a language model reads, if that head can
            be taken off, and full logits of anything else.
        device: Where a kept head goes.
        state_positions: Whose hidden states are stored: `"all"` tokens', or only each row's `"first"`.

    Raises:
        ValueError: If logits cannot be kept that way.
    """

    def __init__(
        self,
        folder: str,
        teacher: Teacher,
        head: Head,
        label_names: Sequence[str],
        dtype: torch.dtype = torch.float32,
        state_dtype: str = "float16",
        logits: KeptLogits = KeptLogits(),  # noqa: B008 (frozen)
        device: torch.device | str = "cpu",
        state_positions: str = "all",
    ) -> None:
        self.folder, self.teacher, self.head = folder, teacher, head
        self.label_names, self.dtype, self.state_dtype = list(label_names), dtype, state_dtype
        self.state_positions = state_positions
        self.fingerprint = teacher_fingerprint(teacher, dtype)
        self.home = teacher_folder(folder, teacher.name, self.fingerprint)
        if head.kind not in ("masked_lm", "causal_lm"):
            if logits.kind in ("hidden_state", "top_k"):
                raise ValueError(
                    f"Only the logits of a language model are kept as {logits.kind!r}; this head is of kind "
                    f'{head.kind!r}. Set teacher_cache_logits="auto".'
                )
            logits = replace(logits, kind="full")
        self._logits, self._device = logits, torch.device(device)
        self._output_head: OutputHead | None = None
        self._asked: tuple[Any, OutputHead | None] = (None, None)
        self._cache: TeacherCache | None = None
        self._filled: list[tuple[Any, AnswerStore]] = []

    @property
    def needs(self) -> Needs:
        """What the open cache keeps."""
        return self._cache.needs if self._cache is not None else Needs()

    def cache(self, needs: Needs, over: Over = "predictions") -> TeacherCache:
        """Open the cache that keeps what is needed; of short logits, at the positions that count `over`."""
        self._logits = replace(self._logits, over=over)
        if needs.logits:
            self._decide()
        if self._cache is None or (self._cache.needs, self._cache.logits) != (needs, self._logits):
            self._cache = TeacherCache(
                self.folder, self.teacher, self.fingerprint, needs, self.head, self.label_names, self.state_dtype,
                self._logits, self.state_positions,
            )  # fmt: skip
        return self._cache

    @property
    def output_head(self) -> OutputHead | None:
        """The teacher's head, where logits are made of what was kept."""
        return self._output_head

    def _decide(self) -> None:
        """Find the teacher's head, if it will be needed: among what was kept, else on the teacher."""
        if self._logits.kind not in ("auto", "hidden_state") or self._output_head is not None:
            return
        self._output_head = read_head(self.home, self._device)
        if self._output_head is None and (head := self._head_on_model()) is not None:
            write_head(self.home, head)
            self._output_head = read_head(self.home, self._device)
        if self._output_head is None and self._logits.kind == "hidden_state":
            raise ValueError(
                "The output head of this teacher cannot be taken off: it is no plain linear layer, or there is no "
                'single model. Set teacher_cache_logits="top_k" or "full".'
            )
        self._logits = replace(self._logits, kind="full" if self._output_head is None else "hidden_state")

    def _head_on_model(self) -> OutputHead | None:
        """The head of the model that is asked, if it can be taken off."""
        if not isinstance(self.teacher, OnlineTeacher) or self.head.kind not in ("masked_lm", "causal_lm"):
            return None
        self.teacher.load()
        model = self.teacher.model
        if self._asked[0] is not model:
            ids = torch.arange(8, device=execution_device(model))[None]
            self._asked = (model, find_output_head(model, ids))
        return self._asked[1]

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
        cache = self.cache(self.needs, self._logits.over)
        if any(known is dataset and store is cache.store for known, store in self._filled):
            return None
        filler = Filler(cache, self._ask, collate, self.label_names, batch_size, self.dtype, rank, world, progress)
        report = filler.fill(rows)
        if self._output_head is not None:
            report.megabytes += (self.home / HEAD).stat().st_size / 1e6
        if report.asked:
            cache.write_manifest(fingerprint=self.fingerprint, dtype=str(self.dtype), last_fill=vars(report))
        barrier()
        cache.store.refresh()
        self._filled.append((dataset, cache.store))
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
        self._asked = (None, None)
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.release()

    def _ask(self, inputs: Mapping[str, Any], needs: Needs, dtype: torch.dtype) -> Activations:
        if not isinstance(self.teacher, LocalTeacher):
            return self.teacher(inputs, needs)
        head = self._head_on_model() if needs.logits and not self._logits.is_full else None
        with without_head(getattr(self.teacher, "model", None), head):
            return unprojected(self.teacher.answer(inputs, needs, dtype), head)


def _size(inputs: Mapping[str, Any]) -> tuple[int, int | None]:
    inputs = teacher_view(inputs)
    rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    tokens = token_mask(inputs)
    return rows, None if tokens is None else tokens.shape[-1]
