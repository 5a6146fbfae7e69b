"""The figure of `size_vs_retention.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from _results import Result
from _size_runs import CARRIED, RANDOM, RECIPE


def figure(results: Sequence[Result], teacher: Result, file: Path) -> None:
    """Size against retention, on a logarithmic axis."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("No figure: it needs `pip install matplotlib`.")
        return
    picture, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, marker in ((RECIPE, "o"), (CARRIED, "s"), (RANDOM, "^")):
        lines = [line for line in results if line.name.endswith(name) and line.retention]
        if lines:
            sizes = [line.parameters / 1e6 for line in lines if line.parameters]
            heights = [100 * mean(line.retention) for line in lines]
            spread = [100 * float(np.std(r.retention, ddof=1)) if len(r.retention) > 1 else 0.0 for r in lines]
            axes.errorbar(sizes, heights, spread, marker=marker, capsize=3, label=name)
    for line in results:
        if line is not teacher and not line.name.endswith((RECIPE, CARRIED, RANDOM)):
            axes.axhline(100 * mean(line.retention), color="grey", linestyle=":", label=line.name)
    axes.set(xscale="log", xlabel="million parameters", ylabel="retention: % of the teacher's accuracy")
    ticks = sorted({line.parameters / 1e6 for line in results if line.parameters and line.name.endswith(RECIPE)})
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"Teacher: {teacher.parameters / 1e6:.1f} M, {100 * teacher.accuracy[0]:.1f} %")  # type: ignore[operator]
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(file, dpi=150)
    pyplot.close(picture)
    print(f"figure: {file}")
