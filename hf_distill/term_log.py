"""Each term's value under its own name, without a device synchronisation on every micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TermLog:
    """Sums terms on the device; reduces over processes once, when drained."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add `value * weight` under a name."""
        value = value.detach().double() if value.device.type != "mps" else value.detach().float()
        weight = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * weight
        self._weights[name] = self._weights.get(name, torch.zeros_like(value)) + weight

    def drain(self, reduce: Callable[[Tensor], Tensor], steps: int | None = None) -> dict[str, float]:
        """The values since the last call, and forget them.

        Args:
            reduce: Sums a tensor over all processes.
            steps: Divide by this number instead of the summed weights.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        both = reduce(torch.stack([torch.stack([self._sums[n], self._weights[n]]) for n in names]))  # (terms, 2)
        self._sums, self._weights = {}, {}
        divisors = both[:, 1].clamp(min=torch.finfo(both.dtype).tiny) if steps is None else max(steps, 1)
        return dict(zip(names, (both[:, 0] / divisors).tolist(), strict=True))
