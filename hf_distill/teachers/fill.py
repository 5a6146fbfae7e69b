"""Asking the teacher about every row once, in batches of like length, and keeping what it says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_distill.activations import Activations, Needs
from hf_distill.random_state import preserved_random_state
from hf_distill.teachers.cache import Collate, TeacherCache, model_inputs
from hf_distill.teachers.cached import teacher_view
from hf_distill.teachers.keys import real_spans
from hf_distill.teachers.rows import batches_of_like_length, fetch, require_rows, row_lengths
from hf_distill.teachers.store import AnswerStore

FLUSH_SECONDS = 10.0  # what a killed run has to ask again at most
FLUSH_BYTES = 64 << 20
# Relative change of an answer from which padding is said to matter; rounding stays well below.
_MATTERS = {torch.float32: 1e-3}

Ask = Callable[[Mapping[str, Any], Needs, torch.dtype], Activations]


@dataclass
class FillReport:
    """What filling a cache did.

    Attributes:
        rows: Rows that this process looked at.
        asked: How many of them the teacher had to be asked about.
        tokens: Their tokens (rows, for inputs without tokens).
        seconds: How long it took.
        megabytes: Size of the whole cache on disk, the output head that it needs too, in 10^6 bytes.
        token_bytes: Size of what was kept for one of these tokens.
        error: Relative error of the answers against fp32, where the teacher ran in less.
    """

    rows: int = 0
    asked: int = 0
    tokens: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    token_bytes: float = 0.0
    error: float | None = None

    def line(self, folder: Any) -> str:
        """The one line that is printed at the end."""
        speed = f", {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s" if self.asked else ""
        size = f" ({self.token_bytes:,.0f} bytes a token)" if self.asked else ""
        error = "" if self.error is None else f"; reduced precision changes the answers by {self.error:.1e}"
        return (
            f"Teacher cache: asked about {self.asked:,} of {self.rows:,} rows in {self.seconds:.1f} s{speed}; "
            f"{self.megabytes:.1f} MB in {folder}{size}{error}"
        )


@dataclass
class Pending:
    """Answers that are not yet on disk."""

    keys: list[np.ndarray] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, keys: np.ndarray, answers: Mapping[str, list[Tensor]]) -> None:
        self.keys.append(keys)
        for name, tensors in answers.items():
            self.rows.setdefault(name, []).extend(tensors)
            self.bytes += sum(tensor.nbytes for tensor in tensors)

    def is_due(self) -> bool:
        return self.bytes > FLUSH_BYTES or time.monotonic() - self.since > FLUSH_SECONDS

    def write_to(self, store: AnswerStore) -> None:
        if self.keys:
            store.write(np.concatenate(self.keys), self.rows)
        self.keys, self.rows, self.bytes, self.since = [], {}, 0, time.monotonic()


@dataclass
class Filler:
    """Fills a cache for datasets.

    Args:
        cache: Where the answers go.
        ask: The teacher: `(inputs, needs, dtype) -> Activations`.
        collate: What makes a batch of rows, as training will.
        label_names: Inputs that are labels.
        batch_size: Rows that the teacher sees at once.
        dtype: Precision that the teacher is run in.
        rank: Number of this process; each asks about its share of the batches.
        world: How many processes there are.
        progress: Whether to show a progress bar.
    """

    cache: TeacherCache
    ask: Ask
    collate: Collate
    label_names: Sequence[str] = ()
    batch_size: int = 32
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    progress: bool = True

    def fill(self, dataset: Any) -> FillReport:
        """Ask about the rows of a dataset that the cache does not know.

        Raises:
            ValueError: If the dataset has no length, its rows change from one reading to the next, or the answers
                would not fit on the disk.
        """
        require_rows(dataset)
        if not len(dataset):
            return FillReport()
        report, start = FillReport(), time.perf_counter()
        with preserved_random_state(), torch.no_grad():
            self._require_fixed_rows(dataset)
            batches = batches_of_like_length(row_lengths(dataset), self.batch_size)[self.rank :: self.world]
            self._fill(dataset, batches, report)
        report.seconds = time.perf_counter() - start
        report.megabytes = self.cache.store.bytes_on_disk() / 1e6
        return report

    def _fill(self, dataset: Any, batches: list[list[int]], report: FillReport) -> None:
        pending, padding_matters, kept = Pending(), None, 0
        total = sum(map(len, batches))
        with tqdm(total=total, desc="Asking the teacher", unit=" rows", disable=not self.progress) as bar:
            for indices in batches:
                rows, batch, keys = self._unknown(fetch(dataset, indices))
                if rows:
                    if padding_matters is None:
                        padding_matters = self._padding_matters(dataset, batches)
                        report.error = self._error(batch)
                    kept += self._ask_about(rows, batch, keys, pending, padding_matters)
                    report.asked += len(rows)
                    report.tokens += count_tokens(teacher_view(batch))
                report.rows += len(indices)
                bar.update(len(indices))
                if pending.is_due():
                    self._require_space(pending, report, total)
                    pending.write_to(self.cache.store)
        pending.write_to(self.cache.store)
        report.token_bytes = kept / max(report.tokens, 1)

    def _ask_about(
        self, rows: list[Any], batch: Mapping[str, Any], keys: np.ndarray, pending: Pending, one_length: bool
    ) -> int:
        """The bytes of the answers."""
        size = 0
        for some in _groups_of_one_length(teacher_view(batch)) if one_length else [np.arange(len(rows))]:
            part = batch if len(some) == len(rows) else self._batch([rows[i] for i in some])
            answers = self._answers(part, self.dtype)
            pending.add(keys[some], answers)
            size += sum(row.nbytes for tensors in answers.values() for row in tensors)
        return size

    def _answers(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, list[Tensor]]:
        """What is kept of a batch."""
        answer = self.ask(model_inputs(batch, self.label_names), self.cache.kept, dtype)
        return self.cache.rows_of(answer, batch)

    def _batch(self, rows: list[Any]) -> Mapping[str, Any]:
        return self.collate(list(rows))

    def _unknown(self, rows: list[Any]) -> tuple[list[Any], Mapping[str, Any], np.ndarray]:
        """The rows that are not in the cache, collated, with their keys."""
        batch = self._batch(rows)
        keys = self.cache.keys(batch)
        unknown = np.flatnonzero(self.cache.store.find(keys) < 0)
        if len(unknown) in (0, len(rows)):
            return (rows if len(unknown) else []), batch, keys
        rows = [rows[i] for i in unknown]
        return rows, self._batch(rows), keys[unknown]

    # ---- What is looked at first ----

    def _require_fixed_rows(self, dataset: Any) -> None:
        some = np.unique(np.linspace(0, len(dataset) - 1, num=min(8, len(dataset)), dtype=int)).tolist()
        first, *others = (self.cache.keys(self._batch(fetch(dataset, some))) for _ in range(3))
        alone = np.concatenate([self.cache.keys(self._batch(fetch(dataset, [row]))) for row in some])
        changed = int(max((first != other).any(1).sum() for other in others))
        if changed:
            raise ValueError(
                f"{changed} of {len(some)} rows are different each time they are read (augmentation in the dataset, "
                "or dynamic masking in the collator), so there is nothing to keep. Make the change once, with "
                "dataset.map, and use a collator that leaves rows as they are; or leave out teacher_cache_dir."
            )
        if (first != alone).any():
            count = int((first != alone).any(1).sum())
            raise ValueError(
                f"{count} of {len(some)} rows are not the same to the teacher in a batch as "
                "alone: they are padded, and no attention_mask says where. Let the collator return one, or pad all "
                "rows to one length; or leave out teacher_cache_dir."
            )

    def _padding_matters(self, dataset: Any, batches: list[list[int]]) -> bool:
        """Whether the shortest row is answered otherwise beside the longest than alone. Then only rows of one length
        are asked about together.
        """
        shortest, longest = fetch(dataset, [batches[-1][-1]])[0], fetch(dataset, [batches[0][0]])[0]
        alone, beside = self._batch([shortest]), self._batch([shortest, longest])
        exact, ours = (self._answers(batch, self.dtype) for batch in (alone, beside))
        first = {name: rows[:1] for name, rows in ours.items()}
        return _relative_error(first, exact) > _MATTERS.get(self.dtype, 5e-2)

    def _error(self, batch: Mapping[str, Any]) -> float | None:
        """Relative error of this precision on one batch."""
        if self.dtype == torch.float32:
            return None
        exact, reduced = (self._answers(batch, dtype) for dtype in (torch.float32, self.dtype))
        return _relative_error(reduced, exact)

    def _require_space(self, pending: Pending, report: FillReport, total: int) -> None:
        """The longest rows come first, so this is an upper bound."""
        needed = pending.bytes / max(sum(map(len, pending.keys)), 1) * (total - report.rows)
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache.folder).free
        if needed > free:
            raise ValueError(
                f"The rest of the teacher cache needs up to {needed / 1e9:.1f} GB, but {self.cache.folder} has "
                f"{free / 1e9:.1f} GB free. Keep fewer layers, choose another teacher_cache_dir, or make space."
            )


def count_tokens(inputs: Mapping[str, Any]) -> int:
    """Real tokens of a batch; rows where the input has none."""
    spans = real_spans(inputs)
    return int(spans.sum()) if spans is not None else len(next(v for v in inputs.values() if isinstance(v, Tensor)))


def _relative_error(ours: Mapping[str, list[Tensor]], exact: Mapping[str, list[Tensor]]) -> float:
    """Of the output that is worst; class indices have none."""
    errors = [0.0]
    for name, rows in exact.items():
        if rows[0].is_floating_point():
            a, b = (torch.cat([row.float().flatten() for row in some]) for some in (ours[name], rows))
            errors.append(float((a - b).norm() / b.norm().clamp(min=1e-6)))
    return max(errors)


def _groups_of_one_length(inputs: Mapping[str, Any]) -> list[np.ndarray]:
    spans = real_spans(inputs)
    if spans is None:
        return [np.arange(len(next(v for v in inputs.values() if isinstance(v, Tensor))))]
    lengths = spans.reshape(len(spans), -1).sum(1)
    return [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
