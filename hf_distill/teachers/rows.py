"""Reading any dataset that has a length: its rows, and how long their texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import IterableDataset

from hf_distill.batching import OVERHEAD, split_by_length
from hf_distill.random_state import preserved_random_state


def require_rows(dataset: Any) -> None:
    """Refuse what cannot be read in any order.

    Raises:
        ValueError: If the dataset is a stream.
    """
    if is_stream(dataset):
        raise ValueError(
            f"A teacher cache needs a dataset with a length, to ask about like lengths together; got "
            f"{type(dataset).__name__}, a stream. Leave out teacher_cache_dir, or load the dataset without streaming."
        )


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read from its beginning."""
    if isinstance(dataset, IterableDataset | datasets.IterableDataset):
        return True
    return not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def columns_of(dataset: Any) -> list[str]:
    """The columns of a dataset; of one that does not name them those of its first row, where it can be read."""
    if names := getattr(dataset, "column_names", None):
        return list(names)
    with preserved_random_state():  # reading a row may draw an augmentation
        if isinstance(dataset, datasets.IterableDataset):
            first = next(iter(dataset.take(1)), None)
        else:
            first = None if is_stream(dataset) or not len(dataset) else dataset[0]
    return list(first) if isinstance(first, Mapping) else []


def fetch(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Some rows, as a data loader reads them."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(indices)))
    return [dataset[i] for i in indices]


def row_lengths(dataset: Any) -> np.ndarray:
    """Tokens of each row, 0 where the rows hold none. Shape: (N,)."""
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        if "input_ids" not in dataset.column_names:
            return np.zeros(len(dataset), dtype=int)
        tables = dataset.select_columns(["input_ids"]).with_format("arrow").iter(1000)
        return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables] or [[]])
    if not len(dataset) or not isinstance(first := dataset[0], Mapping) or "input_ids" not in first:
        return np.zeros(len(dataset), dtype=int)  # images are not read for that
    return np.array([len(dataset[i].get("input_ids", ())) for i in range(len(dataset))])


def batches_of_like_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Indices of all rows in batches, the longest first: what does not fit into memory is told at once.

    Few rows have few of like length: a batch is split where that saves more padding than one batch more costs.

    >>> batches_of_like_length(np.array([3, 9, 4, 9, 2]), batch_size=2)
    [[1, 3], [2, 0], [4]]
    >>> batches_of_like_length(np.array([3, 900, 4, 900, 2]), batch_size=4)
    [[1, 3], [2, 0], [4]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    full = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = []
    for batch in full:
        groups = split_by_length([int(lengths[i]) for i in batch], OVERHEAD)
        batches += [sorted((batch[i] for i in group), key=lambda i: -lengths[i]) for group in reversed(groups)]
    return batches
