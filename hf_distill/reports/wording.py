"""Numbers as words: how every measure is called, written and explained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

UNKNOWN = "-"

# Key -> what the table calls it, and whether it is a share that is written in per cent.
MEASURES: dict[str, tuple[str, bool]] = {
    "accuracy": ("accuracy %", True),
    "macro_f1": ("macro F1 %", True),
    "micro_f1": ("micro F1 %", True),
    "mse": ("mean squared error", False),
    "mae": ("mean absolute error", False),
    "pearson": ("Pearson correlation", False),
    "retention": ("retention %", True),
    "retention_above_chance": ("retention above chance %", True),
    "agreement": ("agreement %", True),
    "kl_to_teacher": ("KL to the teacher, nats", False),
    "rms_to_teacher": ("distance to the teacher", False),
    "pearson_to_teacher": ("correlation with the teacher", False),
    "ece": ("calibration error %", True),
}
MEANINGS: dict[str, str] = {
    "accuracy": "share of right answers.",
    "macro_f1": "unweighted mean of the classes' F1; a rare class counts as much as a frequent one.",
    "micro_f1": "F1 over all labels of all rows; accuracy and agreement are of whole rows, with all their labels.",
    "retention": "the student's score divided by the teacher's; the teacher's by the student's where lower is better.",
    "retention_above_chance": "(student - chance) / (teacher - chance): the share kept of what the teacher knows "
    "beyond chance.",
    "agreement": "share of answers that are the teacher's, right or wrong.",
    "kl_to_teacher": "KL(teacher || student) of the answers at temperature 1, averaged over what is judged; 0 is the "
    "teacher itself.",
    "rms_to_teacher": "root mean squared difference of the two models' answers.",
    "ece": "expected calibration error: mean gap between confidence and accuracy in 15 bins of equal width (Guo et "
    "al., 2017); 0 is calibrated.",
}


def called(key: str) -> str:
    """What a measure is called in tables; a user's own metric by its own name."""
    return MEASURES[key][0] if key in MEASURES else key


def spread(values: Sequence[float], percent: bool = False) -> str:
    """The mean, with the standard deviation over seeds where there are several.

    >>> spread([0.78, 0.80], percent=True), spread([0.12345]), spread([])
    ('79.0 ± 1.4', '0.123', '-')
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or len(known) < len(values):  # a mean over some of the seeds would be another number
        return UNKNOWN
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    deviation = f" ± {_fixed(scale * stdev(known), digits)}" if len(known) > 1 else ""
    return _fixed(scale * fmean(known), digits) + deviation


def measured(key: str, values: Sequence[float]) -> str:
    """A measure's cell in the table."""
    return spread(values, percent=key in MEASURES and MEASURES[key][1])


def told(key: str, values: Sequence[float]) -> str:
    """A measure in a sentence.

    >>> told("accuracy", [0.847]), told("mse", [0.123])
    ('84.7 % accuracy', 'a mean squared error of 0.123')
    """
    name = called(key)
    if name.endswith(" %"):
        return f"{measured(key, values)} % {name.removesuffix(' %')}"
    return f"a {name} of {measured(key, values)}"


def number(value: float | None, digits: int = 0) -> str:
    """A number with a comma at the thousands.

    >>> number(22713986), number(8.651912, 1), number(None)
    ('22,713,986', '8.7', '-')
    """
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def megabytes(value: float | None) -> str:
    """A size, with more places where it is small.

    >>> megabytes(90.868), megabytes(0.0024)
    ('90.9', '0.002')
    """
    return number(value, 3 if value is not None and value < 1 else 1)


def times(factor: float) -> str:
    """How many times as much.

    >>> times(10.49), times(2.04), times(0.25)
    ('10 times', '2.0 times', '0.25 times')
    """
    return f"{factor:.{0 if factor >= 10 else 1 if factor >= 1 else 2}f} times"


def soft_answer(classes: Sequence[str], probabilities: Sequence[float], most: int = 3) -> str:
    """The likeliest classes in words.

    >>> soft_answer(["cat", "lynx", "tiger"], [0.95, 0.03, 0.012])
    '95 % cat, 3 % lynx, 1 % tiger'
    """
    ranked = sorted(zip(probabilities, classes, strict=True), key=lambda pair: -pair[0])[:most]
    return ", ".join(f"{share(probability)} {name}" for probability, name in ranked)


def share(probability: float) -> str:
    """A probability in per cent, without claiming certainty.

    >>> share(0.95), share(0.004), share(0.9996), share(1.0)
    ('95 %', '<1 %', '>99 %', '>99 %')
    """
    if probability < 0.005:
        return "<1 %"
    return ">99 %" if probability >= 0.995 else f"{100 * probability:.0f} %"


def shortened(text: str, most: int = 160) -> str:
    """A text on one line, cut where it is long.

    >>> shortened("one  two three", most=8)
    'one two…'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _fixed(value: float, digits: int) -> str:
    # Very large or very small values keep their significant digits instead of their places.
    if value and (abs(value) >= 1e6 or abs(value) < 10**-digits / 2):
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"
