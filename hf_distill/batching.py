"""Running a model on rows of like length within one batch, instead of on padding.

The batch stays the batch: its rows are split into groups of like length, each group runs without the columns that are
padding for all of it, and the outputs are put together again as if the batch had run whole. So the loss and its
gradient are the same, whatever the architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_distill.activations import Head

# What a model may return and what we can put together, with the dimensions that are as long as the text.
LOGITS = ("logits", "start_logits", "end_logits")
_LAYERS = {"hidden_states": (1,), "attentions": (2, 3)}
# What one group more costs, in tokens: calling every layer, and adding up the gradient of every weight, once more.
# Measured on a CPU for 4 x 64 to 6 x 768: within 5 % of the best of 2 to 400 everywhere.
OVERHEAD = 50.0


def split_by_length(lengths: Sequence[int], overhead: float) -> list[list[int]]:
    """Rows in the groups that make a batch cheapest: each costs its rows times its longest, plus `overhead` tokens.

    Exact, by dynamic programming over the sorted rows.

    >>> split_by_length([3, 40, 4, 38], overhead=10)
    [[0, 2], [3, 1]]
    >>> split_by_length([3, 40, 4, 38], overhead=1000)
    [[0, 2, 3, 1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0.0], [0]  # over the first n rows: the least cost, and where its last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [best[begin] + overhead + (end - begin) * longest for begin in range(end)]
        cut.append(min(range(end), key=costs.__getitem__))
        best.append(costs[cut[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def real_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """How many columns each row needs, counted from the left; `None` where padding is unknown.

    Padding on the left counts as needed: cutting it would move the positions of the others.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or ids.ndim != 2 or mask.shape != ids.shape:
        return None
    real = mask != 0
    columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return torch.where(real, columns, 0).amax(1).clamp(min=1).tolist()


def run_without_padding(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    head: Head,
    overhead: float = OVERHEAD,
) -> Any:
    """`model(**inputs, **arguments)`, computed group by group where that is cheaper.

    Args:
        model: A Transformers model.
        inputs: A collated batch.
        arguments: What else the model is called with.
        head: What its logits mean.
        overhead: Cost of one group more, in tokens.

    Raises:
        ValueError: If the model returns something that cannot be put together.
    """
    lengths = real_lengths(inputs)
    groups = [] if lengths is None else split_by_length(lengths, overhead)
    width = inputs["input_ids"].shape[1] if groups else 0
    if not groups or (len(groups) == 1 and max(lengths or ()) == width):
        return model(**inputs, **arguments)
    parts = [_part(inputs, group, max(lengths[i] for i in group)) for group in groups]  # type: ignore[index]
    with _embedded_once(
        model, inputs["input_ids"], [(p["input_ids"], rows) for p, rows in zip(parts, groups, strict=True)]
    ):
        outputs = [model(**part, **arguments) for part in parts]
    back = torch.tensor([i for group in groups for i in group], device=inputs["input_ids"].device).argsort()
    return _merged(outputs, back, width, head)


def _part(inputs: Mapping[str, Any], rows: list[int], length: int) -> dict[str, Any]:
    shape = inputs["input_ids"].shape
    part = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == shape[0]:
            value = value[rows, :length] if value.shape[:2] == shape else value[rows]
        part[name] = value
    return part


def padding_is_inert(
    model: nn.Module, inputs: Mapping[str, Any], arguments: Mapping[str, Any], head: Head, pad_token_id: int = 0
) -> bool:
    """Whether a model in hand answers alike with and without padding, tried on a batch whose last columns are masked.

    Models that mix positions without looking at the mask (convolutions, Fourier transforms, pooling) do not, and what
    a batch normalisation does depends on the group.
    """
    masked = with_masked_ends(inputs, pad_token_id)
    if masked is None or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return False
    with torch.no_grad():
        try:
            whole = model(**masked, **arguments)
            parts = run_without_padding(model, masked, arguments, head, overhead=0.0)
        except (ValueError, NotImplementedError, IndexError):
            return False
    ours, theirs = (answers_that_count(outputs, masked, head) for outputs in (parts, whole))
    tolerances = [1e-3 if x.dtype.itemsize >= 4 else 5e-2 for x in theirs]
    return all(is_close(a, b, t) for a, b, t in zip(ours, theirs, tolerances, strict=True))


def with_masked_ends(inputs: Mapping[str, Any], pad_token_id: int) -> dict[str, Any] | None:
    """A batch whose last columns are padding in every row, one column more in every second; `None` if it is too short
    or padding is unknown.
    """
    lengths = real_lengths(inputs)
    cut = min(2, max(lengths or [0]) - 1)
    if lengths is None or cut < 1:
        return None
    masked = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for row in range(len(lengths)):
        end = max(1, max(lengths) - cut - row % 2)
        masked["attention_mask"][row, end:] = 0
        masked["input_ids"][row, end:] = pad_token_id
    return masked


def answers_that_count(outputs: Mapping[str, Any], inputs: Mapping[str, Any], head: Head) -> list[Tensor]:
    """A model's logits, those at padding left out."""
    logits = [outputs[name] for name in LOGITS if outputs.get(name) is not None]
    return logits if head.kind == "rows" else [x[inputs["attention_mask"] != 0] for x in logits]


def is_close(ours: Tensor, theirs: Tensor, tolerance: float, floor: float = 1e-6) -> bool:
    """Whether the difference is below `tolerance` of the norm, plus `floor`."""
    return bool((ours - theirs).float().norm() <= tolerance * theirs.float().norm() + floor)


@contextlib.contextmanager
def _embedded_once(model: Any, ids: Tensor, parts: Sequence[tuple[Tensor, list[int]]]) -> Iterator[None]:
    """Look all tokens up at once: the gradient of an embedding is as large as its whole table, once for each look."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # CANINE hashes its characters into several tables
        embedding = None
    if not isinstance(embedding, nn.Module) or not torch.is_grad_enabled():
        yield
        return
    everything: Tensor | None = embedding(ids)

    def instead(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        for part, rows in parts:
            if args and args[0] is part and everything is not None:
                return everything[rows, : part.shape[1]]
        return None

    handle = embedding.register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()


def _merged(outputs: list[Any], back: Tensor, width: int, head: Head) -> Any:
    """One output for the whole batch, its rows in their order; the columns that were cut are 0."""

    def joined(tensors: list[Tensor], axes: tuple[int, ...]) -> Tensor:
        return torch.cat([_widened(tensor, axes, width) for tensor in tensors])[back]

    merged: dict[str, Any] = {}
    for name, first in outputs[0].items():
        values = [output[name] for output in outputs]
        if name in LOGITS:
            merged[name] = joined(values, () if head.kind == "rows" else (1,))
        elif name in _LAYERS:
            layers = zip(*values, strict=True)
            merged[name] = tuple(None if ls[0] is None else joined(list(ls), _LAYERS[name]) for ls in layers)
        elif first is not None and first != ():
            raise ValueError(f"{type(outputs[0]).__name__}.{name} cannot be put together from parts of a batch.")
    return type(outputs[0])(**merged)


def _widened(tensor: Tensor, axes: tuple[int, ...], width: int) -> Tensor:
    padding = [0] * (2 * tensor.ndim)
    for axis in axes:
        padding[2 * (tensor.ndim - 1 - axis) + 1] = width - tensor.shape[axis]
    return F.pad(tensor, padding) if any(padding) else tensor
