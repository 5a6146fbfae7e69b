"""Axes that are numbered alike, and how each holds what is numbered: what `spaces.py` finds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How an axis holds the units of a space: `chunks` parts, of which `used` hold all units in `block`s.

    GPT-2's fused projection to queries, keys and values holds its heads in three chunks.
    """

    chunks: int = 1
    used: tuple[int, ...] = (0,)

    def spread(self, chosen: Tensor, size: int) -> Tensor:
        """Positions on an axis of `size`, in the order in which `chosen` puts the units."""
        part = size // self.chunks
        block = part // len(chosen)
        inside = (chosen[:, None] * block + torch.arange(block)).flatten()
        whole = torch.arange(part)
        return torch.cat([part * k + (inside if k in self.used else whole) for k in range(self.chunks)])

    def mask(self, units: Tensor, size: int) -> Tensor:
        """Which positions on an axis of `size` are kept, if these units are."""
        part = size // self.chunks
        inside, whole = units.repeat_interleave(part // len(units)), torch.ones(part, dtype=torch.bool)
        return torch.cat([inside if k in self.used else whole for k in range(self.chunks)])

    def gather(self, values: Tensor, units: int) -> Tensor:
        """The sum of the values at the positions of each unit."""
        return values.view(self.chunks, units, -1)[list(self.used)].sum((0, 2))


@dataclass(frozen=True)
class Kind:
    """What is permuted: `units` of an axis of size `width`, freely or only inside each of `groups` equal parts.

    Heads are blocks on axes of several `sizes`: those of queries, of keys and values, of a bias with one entry a head.
    """

    name: str
    units: int
    width: int
    groups: int = 1
    sizes: tuple[int, ...] = ()

    def permutation(self) -> Tensor:
        """A fixed permutation that moves every unit: one random cycle in each group."""
        generator = torch.Generator().manual_seed(0)
        part = self.units // self.groups
        order = torch.arange(self.units)
        for group in range(self.groups):
            cycle = torch.randperm(part, generator=generator) + part * group
            order[cycle] = cycle.roll(1)
        return order

    def layouts(self, size: int) -> tuple[Layout, ...]:
        """How an axis of this size may hold the units."""
        if self.name == "heads":
            fits = size % self.units == 0 and size in self.sizes
            three = (Layout(3, (0, 1, 2)),) if size == 3 * self.width else ()
            return (*three, Layout()) if fits else ()
        found = {
            1: (Layout(),),
            2: (Layout(2, (0, 1)), Layout(2, (0,)), Layout(2, (1,))),
            3: (Layout(3, (0, 1, 2)), Layout(3, (0, 1)), Layout(3, (2,))),
        }
        return found.get(size // self.width, ()) if size % self.width == 0 else ()


@dataclass
class Space:
    """Axes that are numbered alike: the layout of each output and input, by module, and of parameters without one."""

    kind: Kind
    outputs: dict[str, Layout] = field(default_factory=dict)
    inputs: dict[str, Layout] = field(default_factory=dict)
