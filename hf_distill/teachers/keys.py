"""A key for what a teacher sees of a row: equal for equal content, whatever padding the batch brought along."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two independent 64-bit sums. A row is no adversary: chance alone would have to make both of them equal.
_SEEDS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
_CHOICE = 1 << 32  # positions of one answer choice never meet those of the next


def content_keys(inputs: Mapping[str, Any], names: Iterable[str]) -> np.ndarray:
    """A 128-bit key for each row of a batch.

    Two rows have the same key if the teacher sees the same in them. Padding is not content: it may stand on either
    side and be of any length.

    Args:
        inputs: A collated batch on the CPU.
        names: The inputs that the teacher reads.

    Shape:
        (B, 2), uint64.

    >>> short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> bool((content_keys(short, short) == content_keys(padded, padded)).all())
    True
    """
    seen = {name: inputs[name] for name in sorted(names) if isinstance(inputs.get(name), Tensor)}
    if not seen:
        raise ValueError(f"The batch holds nothing that the teacher reads, only {sorted(inputs)}.")
    spans, positions = _spans(inputs)
    keys = np.zeros((len(next(iter(seen.values()))), 2), np.uint64)
    for name, tensor in seen.items():
        bits = _bits(tensor)
        if spans is not None and bits.shape[: spans.ndim] == spans.shape:
            inner = bits.reshape(*spans.shape, -1)
            where = positions[..., None] * np.uint64(inner.shape[-1]) + np.arange(inner.shape[-1], dtype=np.uint64)
            # One more than the value, so that a zero is content and padding is not.
            values = np.where(spans[..., None], inner + np.uint64(1), np.uint64(0)).reshape(len(keys), -1)
            weights = [_weights(where.reshape(len(keys), -1), name, seed) for seed in _SEEDS]
        else:
            values = bits.reshape(len(keys), -1) + np.uint64(1)
            weights = [_fixed_weights(values.shape[1], name, int(seed)) for seed in _SEEDS]
        keys += np.stack([(values * weight).sum(1, dtype=np.uint64) for weight in weights], 1)
    return keys


def real_spans(inputs: Mapping[str, Any]) -> np.ndarray | None:
    """(B, ..., T) from the first to the last real token of each row; `None` for inputs without a mask or tokens."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is None and ids is not None:
        return np.ones(tuple(ids.shape), dtype=bool)
    if mask is None or (ids is not None and mask.shape != ids.shape):
        return None
    real = mask.numpy() != 0
    from_left = np.logical_or.accumulate(real, axis=-1)
    from_right = np.logical_or.accumulate(real[..., ::-1], axis=-1)[..., ::-1]
    return from_left & from_right


def _spans(inputs: Mapping[str, Any]) -> tuple[np.ndarray | None, Any]:
    """The spans, and in each the positions counted from its beginning."""
    spans = real_spans(inputs)
    if spans is None:
        return None, None
    first = spans.argmax(-1)[..., None]
    positions = np.maximum(np.arange(spans.shape[-1]) - first, 0).astype(np.uint64)
    if spans.ndim == 3:  # multiple choice
        positions += (np.arange(spans.shape[1], dtype=np.uint64) * np.uint64(_CHOICE))[:, None]
    return spans, positions


def _bits(tensor: Tensor) -> np.ndarray:
    """The values as 64-bit words: whole numbers as they are, floats by their fp32 bits."""
    if tensor.is_floating_point():
        return tensor.float().contiguous().view(torch.int32).numpy().astype(np.uint64)
    return tensor.to(torch.int64).numpy().astype(np.uint64)


def _weights(positions: np.ndarray, name: str, seed: np.uint64) -> np.ndarray:
    """An odd pseudo-random factor for each position (splitmix64): changing one value always changes the sum."""
    with np.errstate(over="ignore"):
        x = (positions + np.uint64(zlib.crc32(name.encode()) + 1)) * seed
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) | np.uint64(1)


@lru_cache(maxsize=8)
def _fixed_weights(size: int, name: str, seed: int) -> np.ndarray:
    return _weights(np.arange(size, dtype=np.uint64), name, np.uint64(seed))
