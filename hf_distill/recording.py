"""Queries, keys and values, which no model returns: recorded where they enter attention.

For the length of one forward a twin stands in for the model's attention, records what it is given and calls the
model's own function. Nothing is recorded elsewhere: not in other threads, and not when activation checkpointing runs a
block again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hf_distill.activations import QKV, Indices
from hf_distill.attention_twin import AttentionTwin, attention_configs


class _Recorder:
    def __init__(self, indices: Indices) -> None:
        self.indices, self.calls = indices, 0
        self.layers: dict[int, QKV] = {}

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.calls += 1
        if self.indices is True or self.calls in self.indices:
            self.layers[self.calls] = (query, key, value)


_active: ContextVar[_Recorder | None] = ContextVar("active", default=None)


@contextlib.contextmanager
def recording(model: nn.Module, indices: Indices) -> Iterator[dict[int, QKV]]:
    """Record queries, keys and values of some blocks in the one forward of `model` that runs inside.

    Works with eager attention, SDPA and whatever else is registered; the output stays what it was. Queries are
    (B, A, T, D); keys and values may have fewer heads (grouped queries). Rotary positions are applied already.

    Args:
        model: A Transformers model, wrapped or not.
        indices: Which blocks, from 1, or `True` for all; none leaves the model alone.

    Returns:
        A dictionary that is full after the forward: index -> (queries, keys, values).

    Raises:
        ValueError: If the model does not call the attention interface once for each block.
    """
    recorder = _Recorder(indices)
    if not indices:
        yield recorder.layers
        return
    with _twin.standing_in(model):
        token = _active.set(recorder)
        try:
            yield recorder.layers
        except KeyError as error:
            if _twin.prefix in str(error):  # a table of attention functions of the model's own, which lacks the twin
                _require_one_call_a_block(model, recorder)
            raise
        finally:
            _active.reset(token)
    _require_one_call_a_block(model, recorder)


def _require_one_call_a_block(model: nn.Module, recorder: _Recorder) -> None:
    configs = attention_configs(model)
    blocks = getattr(configs[0], "num_hidden_layers", None) if configs else None
    if recorder.calls == blocks:
        return
    name = next((type(m).__name__ for m in model.modules() if hasattr(m, "config")), type(model).__name__)
    raise ValueError(
        f"A loss needs queries, keys and values, but {name} handed them to Transformers' attention interface "
        f"{recorder.calls} times for {blocks} blocks: it computes attention in a way of its own (MPNet, DeBERTa), or "
        "in several stacks. Drop the loss on attention relations, or use another model."
    )


def _attend(
    own: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    recorder = _active.get()
    if recorder is not None:
        recorder.add(query, key, value)
    return own(module, query, key, value, *args, **kwargs)


_twin = AttentionTwin("hf_distill_recording_", _attend)
