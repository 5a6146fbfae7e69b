"""Standing in for a model's attention function, for the length of one forward.

Transformers looks its attention functions up by name (`AttentionInterface`), and the functions that make their masks
too. A twin is registered under a name of its own; for a while the model's configs carry that name, so that the twin is
called, and may call the model's own function.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_lock = threading.RLock()  # two threads that share a model must not restore its setting under each other


@dataclass(frozen=True)
class AttentionTwin:
    """A function that is called where a model would call its own attention.

    Attributes:
        prefix: What the model's own name (`"sdpa"`, `"eager"`) gets in front.
        attend: Called as `attend(own, module, query, key, value, ...)`.
        mask: Called as `mask(own, **arguments)` where the model has a mask made; its own function if left out.
    """

    prefix: str
    attend: Callable[..., Any]
    mask: Callable[..., Any] | None = None

    @contextlib.contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """Set every config of the model to the twin of its attention, and back."""
        with _lock:
            own = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
            try:
                for config, name in own:  # the setter would change configs that belong to other models
                    config._attn_implementation_internal = self._name(name or "eager")
                yield
            finally:
                for config, name in own:
                    config._attn_implementation_internal = name

    def _name(self, own: str) -> str:
        if own.startswith(self.prefix):
            return own
        name = self.prefix + own
        if name not in ALL_ATTENTION_FUNCTIONS:
            mask = ALL_MASK_ATTENTION_FUNCTIONS[own]
            AttentionInterface.register(name, functools.partial(self._attend, own))
            AttentionMaskInterface.register(name, functools.partial(self.mask, mask) if self.mask else mask)
        return name

    def _attend(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.attend(_own_function(module, name), module, *args, **kwargs)


def attention_configs(model: nn.Module) -> list[Any]:
    """The configs that say which attention a model runs; its own first."""
    configs = [
        m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation_internal")
    ]
    return list({id(config): config for config in configs}.values())


def _own_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the module would call: its file's eager one, or what is registered under the name there."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        if name == "eager" and "eager_attention_forward" in names:
            return names["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in names:
            return names["ALL_ATTENTION_FUNCTIONS"][name]
    raise ValueError(
        f"{type(module).__name__} has no attention function of the name {name!r}. Load the model with "
        "attn_implementation='sdpa' or 'eager'."
    )
