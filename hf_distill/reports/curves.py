"""Learning curves, out of what a Trainer has logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Curve = list[tuple[float, float]]  # step, value

MOST_POINTS = 400
# What Trainer logs of time and size; no curve of learning.
_NO_CURVE = ("_runtime", "_per_second", "_preparation_time", "_flos")


def learning_curves(log_history: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """The loss, every term of it, and every evaluation, by step.

    Args:
        log_history: `trainer.state.log_history`.

    >>> learning_curves([{"loss": 2.0, "soft_loss": 1.5, "step": 10, "learning_rate": 1e-3}])
    {'loss': [(10.0, 2.0)], 'soft_loss': [(10.0, 1.5)]}
    """
    curves: dict[str, Curve] = {}
    for entry in log_history:
        for name, value in entry.items():
            if _is_curve(name) and isinstance(value, (int, float)) and "step" in entry:
                curves.setdefault(name, []).append((float(entry["step"]), float(value)))
    return {name: _thinned(points) for name, points in curves.items()}


def _is_curve(name: str) -> bool:
    if name.endswith(_NO_CURVE) or name == "train_loss":  # the mean over the whole run, logged once at its end
        return False
    return name == "loss" or name.endswith("_loss") or name.startswith("eval_")


def _thinned(points: Sequence[tuple[float, float]]) -> Curve:
    """At most `MOST_POINTS`, evenly spread, the last one kept."""
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
