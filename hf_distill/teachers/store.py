"""Rows of answers on disk: Arrow files that appear whole or not at all, looked up by content key.

Each file is an Arrow stream as `datasets` writes it: `datasets.Dataset.from_file` opens it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

KEY = "teacher_key"
_UNFINISHED = ".unfinished"


@dataclass
class _Column:
    """One output of one file, memory-mapped: the rows' values one after the other, and their shapes."""

    values: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray  # (rows, rank)

    def row(self, index: int) -> Tensor:
        values = self.values[self.starts[index] : self.starts[index + 1]]
        return torch.from_numpy(values.reshape(self.shapes[index]).copy())


class AnswerStore:
    """A folder of answers, one row a key.

    Writers need no lock: every file has a name of its own, is written beside its final name, flushed to disk and
    renamed. What is half-written never has a name that is read.

    Args:
        folder: Where the files are; made when something is written.
        columns: Name -> dtype: `"float32"`, `"float16"`, or `"int32"` for what is counted.
    """

    def __init__(self, folder: str | os.PathLike[str], columns: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.columns = dict(columns)
        self._files: dict[str, dict[str, _Column]] = {}
        self._where: list[tuple[str, int]] = []  # position in the index -> file, row
        self._keys = np.zeros((0, 2), np.uint64)
        self.refresh()

    def __len__(self) -> int:
        return len(np.unique(self._keys, axis=0))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "columns": self.columns}  # another process opens the files itself

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def refresh(self) -> None:
        """Read the files that have appeared since."""
        new = [path for path in sorted(self.folder.glob("*.arrow")) if path.name not in self._files]
        keys = [self._keys]
        for path in new:
            read, columns = self._open(path)
            self._files[path.name] = columns
            self._where += [(path.name, row) for row in range(len(read))]
            keys.append(read)
        self._keys = np.concatenate(keys)
        self._order = np.argsort(self._keys[:, 0], kind="stable")
        self._sorted = self._keys[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where each key is, -1 where it is not. Shape: (B, 2) -> (B,)."""
        found = np.full(len(keys), -1, np.int64)
        for i, place in enumerate(np.searchsorted(self._sorted[:, 0], keys[:, 0])):
            while place < len(self._sorted) and self._sorted[place, 0] == keys[i, 0]:
                if self._sorted[place, 1] == keys[i, 1]:
                    found[i] = self._order[place]
                    break
                place += 1
        return found

    def read(self, positions: Sequence[int] | np.ndarray, column: str) -> list[Tensor]:
        """One output of some rows, as they were written."""
        places = (self._where[int(position)] for position in positions)
        return [self._files[file][column].row(row) for file, row in places]

    def write(self, keys: np.ndarray, answers: Mapping[str, Sequence[Tensor]]) -> None:
        """Add rows; they are safely on disk when this returns.

        Raises:
            OSError: If the folder cannot be written or the disk is full; nothing half-written is left then.
        """
        self._remove_abandoned()
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pa.table({KEY: pa.array([key.tobytes() for key in keys], pa.binary(16)), **self._arrays(answers)})
        name = f"{uuid.uuid4().hex}.arrow"
        unfinished = self.folder / (name + _UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=max(len(keys), 1))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self.refresh()

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.arrow"))

    def _arrays(self, answers: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for name, dtype in self.columns.items():
            rows = [np.ascontiguousarray(row.numpy(), dtype=dtype) for row in answers[name]]
            flat = np.concatenate([row.reshape(-1) for row in rows]) if rows else np.zeros(0, dtype)
            starts = np.cumsum([0, *(row.size for row in rows)])
            arrays[name] = pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(flat))
            arrays[_shape(name)] = pa.array([list(row.shape) for row in rows], pa.list_(pa.int32()))
        return arrays

    def _open(self, path: Path) -> tuple[np.ndarray, dict[str, _Column]]:
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                table = reader.read_all()
            keys = np.frombuffer(b"".join(table[KEY].to_pylist()), np.uint64).reshape(-1, 2)
            columns = {name: _column(table, name, dtype) for name, dtype in self.columns.items()}
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is no readable part of a teacher cache ({error}). Delete it: its rows will be asked again."
            ) from error
        return keys, columns

    def _remove_abandoned(self, older_than: float = 3600.0) -> None:
        """Leftovers of processes that were killed while writing."""
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            try:
                if time.time() - path.stat().st_mtime > older_than:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                continue


def _shape(name: str) -> str:
    return f"{name}_shape"


def _column(table: pa.Table, name: str, dtype: str) -> _Column:
    lists, shapes = table[name].combine_chunks(), table[_shape(name)].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists, shapes = lists.chunk(0), shapes.chunk(0)
    values = lists.values.to_numpy(zero_copy_only=True)
    if values.dtype != np.dtype(dtype):
        raise ValueError(f"{name} is {values.dtype}, not {dtype}")
    ranks = shapes.values.to_numpy().reshape(len(lists), -1)
    return _Column(values, lists.offsets.to_numpy(), ranks)
