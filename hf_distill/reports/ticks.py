"""Where the marks and words of a figure go."""

from __future__ import annotations

import math
from collections.abc import Sequence


def apart(heights: Sequence[float], least: float = 14.0) -> list[float]:
    """Vertical shifts in points, so that labels of nearly equal heights do not lie on each other."""
    span = (max(heights) - min(heights)) or 1.0
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = {i: 120.0 * (heights[i] - min(heights)) / span for i in order}  # a point of the plot is 120 high or so
    shifts, last = [0.0] * len(heights), -math.inf
    for i in order:
        place = max(places[i], last + least)
        shifts[i], last = place - places[i], place
    return shifts


def round_numbers(low: float, high: float) -> list[float]:
    """Up to five ticks of a logarithmic axis.

    >>> round_numbers(0.09, 9.0), round_numbers(1e-3, 50.0)
    ([0.1, 0.3, 1.0, 3.0], [0.001, 0.01, 0.1, 1.0, 10.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens, threes = ([float(f"{first}e{power}") for power in powers] for first in (1, 3))
    every = [tick for tick in sorted([*tens, *threes]) if low <= tick <= high]
    return every if len(every) <= 5 else [tick for tick in tens if low <= tick <= high][-5:]


def spread_out(sizes: Sequence[float], least: float = 1.3) -> list[float]:
    """Those that are far enough apart for a label each, on a logarithmic axis."""
    kept: list[float] = []
    for size in sorted(sizes):
        if not kept or size > least * kept[-1]:
            kept.append(size)
    return kept


def compact(size: float) -> str:
    """A number of parameters in three digits.

    >>> compact(22713986), compact(2160962), compact(650), compact(7e9)
    ('22.7 M', '2.16 M', '650', '7 B')
    """
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.0f}"


def repeated(colours: Sequence[str], count: int) -> list[str]:
    """As many colours as are needed, from the first again where they are too few."""
    return [colours[i % len(colours)] for i in range(count)]
