"""Queries, keys and values, which no model returns: recorded where they enter attention.

Transformers looks its attention functions up by name (`AttentionInterface`). For the length of one forward the model's
own name is replaced by one whose function records what it is given and then calls the model's own function. Nothing is
recorded elsewhere: not in other threads, and not when activation checkpointing runs a block again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_distill.activations import QKV, Indices

_PREFIX = "hf_distill_recording_"
_lock = threading.RLock()  # two threads that share a model must not restore its setting under each other


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
    with _lock, _renamed_attention(model):
        token = _active.set(recorder)
        try:
            yield recorder.layers
        except KeyError as error:
            if _PREFIX in str(error):  # a table of attention functions of the model's own, which lacks the twin
                _require_one_call_a_block(model, recorder)
            raise
        finally:
            _active.reset(token)
    _require_one_call_a_block(model, recorder)


def _require_one_call_a_block(model: nn.Module, recorder: _Recorder) -> None:
    blocks = getattr(_configs(model)[0], "num_hidden_layers", None) if _configs(model) else None
    if recorder.calls == blocks:
        return
    name = next((type(m).__name__ for m in model.modules() if hasattr(m, "config")), type(model).__name__)
    raise ValueError(
        f"A loss needs queries, keys and values, but {name} handed them to Transformers' attention interface "
        f"{recorder.calls} times for {blocks} blocks: it computes attention in a way of its own (MPNet, DeBERTa), or "
        "in several stacks. Drop the loss on attention relations, or use another model."
    )


@contextlib.contextmanager
def _renamed_attention(model: nn.Module) -> Iterator[None]:
    """Set every config of the model to the recording twin of its attention, and back."""
    own = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        for config, name in own:  # the setter would change configs that belong to other models
            config._attn_implementation_internal = _recording_twin(name or "eager")
        yield
    finally:
        for config, name in own:
            config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    configs = [
        m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation_internal")
    ]
    return list({id(config): config for config in configs}.values())


def _recording_twin(name: str) -> str:
    """The name of a function that records and then does what `name` does; with the same masks."""
    if name.startswith(_PREFIX):
        return name
    twin = _PREFIX + name
    if twin not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(twin, functools.partial(_attend, name))
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return twin


def _attend(name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    recorder = _active.get()
    if recorder is not None:
        recorder.add(query, key, value)
    return _own_function(module, name)(module, query, key, value, *args, **kwargs)


def _own_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the module would call: its file's eager one, or what is registered under the name there."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        if name == "eager" and "eager_attention_forward" in names:
            return names["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in names:
            return names["ALL_ATTENTION_FUNCTIONS"][name]
    raise ValueError(
        f"{type(module).__name__} has no attention function of the name {name!r}. Drop the loss on attention "
        "relations."
    )
