"""The report's metrics as `evaluate` modules, one a folder; they load without the Hub.

>>> from hf_distill import metrics
>>> metrics.path("retention").endswith("retention")
True
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("accuracy", "agreement", "expected_calibration_error", "macro_f1", "retention")


def path(name: str) -> str:
    """The folder of a module, for `evaluate.load(path)` or to be pushed as a Space.

    Raises:
        ValueError: If there is no such module.
    """
    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r} in hf_distill. Take one of {', '.join(NAMES)}.")
    return str(Path(__file__).parent / name)


def load(name: str, **kwargs: Any) -> Any:
    """`evaluate.load` of a module that ships with hf_distill; nothing is downloaded.

    Args:
        name: One of `NAMES`.
        kwargs: What else `evaluate.load` takes, for example `experiment_id`.

    Raises:
        ImportError: If `evaluate` is not installed.
        ValueError: If there is no such module.
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("hf_distill.metrics.load needs evaluate: pip install 'hf_distill[reports]'.") from error
    return evaluate.load(path(name), **kwargs)
