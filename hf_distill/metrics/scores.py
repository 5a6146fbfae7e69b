"""How good answers are, and how much of a teacher a student keeps: plain formulas on arrays, each of them once.

The `evaluate` modules beside this file and the report call these. Imports NumPy alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100  # the label of what is not to be judged: padding, special tokens, later pieces of a word


def accuracy(answers: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of right answers among the labels other than -100.

    Shape:
        (...), (...) -> ().

    Raises:
        ValueError: If the shapes differ or no label is left.

    >>> accuracy([0, 1, 2, 2], [0, 1, 1, -100])
    0.6666666666666666
    """
    answer, label = _judged(answers, labels)
    return float((answer == label).mean())


def macro_f1(answers: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Unweighted mean of the classes' F1 = 2 TP / (2 TP + FP + FN), over the classes that are a label or an answer.

    Labels of -100 are left out.

    Shape:
        (...), (...) -> ().

    Raises:
        ValueError: If the shapes differ or no label is left.

    >>> macro_f1([0, 1, 1], [0, 0, 1])
    0.6666666666666666
    """
    answer, label = _judged(answers, labels)
    classes, codes = np.unique(np.concatenate([answer, label]), return_inverse=True)
    answer, label = codes[: len(answer)], codes[len(answer) :]
    hits = np.bincount(label[answer == label], minlength=len(classes))
    both = np.bincount(answer, minlength=len(classes)) + np.bincount(label, minlength=len(classes))
    return float((2 * hits / both).mean())


def label_f1(answers: npt.ArrayLike, labels: npt.ArrayLike) -> np.ndarray[Any, Any]:
    """F1 of each label, where rows have any number of them; NaN for one that is neither given nor right anywhere.

    Shape:
        (N, V), (N, V) of truth values -> (V,).

    Raises:
        ValueError: If the shapes differ or there is no row.

    >>> label_f1([[1, 0, 0], [1, 1, 0]], [[1, 0, 0], [0, 1, 0]])
    array([0.66666667, 1.        ,        nan])
    """
    answer, label = _given(answers, labels)
    both = (answer.sum(0) + label.sum(0)).astype(np.float64)
    return np.divide(2.0 * (answer & label).sum(0), both, out=np.full_like(both, np.nan), where=both > 0)


def macro_f1_of_labels(answers: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Unweighted mean of the labels' F1 ([`label_f1`]), over those that are given or right anywhere; NaN without any.

    Shape:
        (N, V), (N, V) of truth values -> ().
    """
    known = label_f1(answers, labels)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else math.nan


def micro_f1(answers: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) over all labels of all rows; 1 where none is given and none is right.

    Shape:
        (N, V), (N, V) of truth values -> ().

    Raises:
        ValueError: If the shapes differ or there is no row.

    >>> micro_f1([[1, 0], [1, 1]], [[1, 0], [0, 1]])
    0.8
    """
    answer, label = _given(answers, labels)
    both = int(answer.sum() + label.sum())
    return float(2 * int((answer & label).sum()) / both) if both else 1.0


def agreement(student: npt.ArrayLike, teacher: npt.ArrayLike) -> float:
    """Share of the student's answers that are the teacher's, right or wrong; a teacher's answer of -100 is left out.

    Shape:
        (...), (...) -> ().

    >>> agreement([0, 1, 2], [0, 1, 1])
    0.6666666666666666
    """
    return accuracy(student, teacher)


def expected_calibration_error(confidences: npt.ArrayLike, right: npt.ArrayLike, bins: int = 15) -> float:
    """How far confidence is from accuracy: the mean |accuracy - confidence| of bins of equal width, weighted by rows.

    `Σ_m |B_m| / N * |acc(B_m) - conf(B_m)|` with bins ((m - 1) / M, m / M] (Guo et al., 2017, "On Calibration of
    Modern Neural Networks", equation 3, which takes 15 bins).

    Args:
        confidences: Probability of each given answer.
        right: Whether it was right.
        bins: How many bins.

    Shape:
        (N,), (N,) -> ().

    Raises:
        ValueError: If the shapes differ, there are no rows, or a confidence is no probability.

    >>> round(expected_calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]), 4)
    0.15
    """
    confidence, hit = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != hit.shape or not confidence.size:
        raise ValueError(f"Calibration needs one confidence a row, got shapes {confidence.shape} and {hit.shape}.")
    # fp32 softmax may exceed 1 by rounding.
    if not ((confidence >= 0) & (confidence <= 1 + 1e-5)).all() or bins < 1:
        raise ValueError(
            f"Calibration needs probabilities in [0, 1] and bins >= 1, got bins={bins} and confidences from "
            f"{confidence.min()} to {confidence.max()}. Pass softmax outputs, not logits."
        )
    where = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(where, weights=hit - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(hit))


def retention(student: float, teacher: float, greater_is_better: bool = True) -> float:
    """Share of the teacher's score that the student keeps: student / teacher; teacher / student where lower is better.

    NaN where the quotient means nothing: the divisor is not positive.

    >>> retention(0.8, 1.0), retention(2.0, 1.0, greater_is_better=False)
    (0.8, 0.5)
    """
    part, whole = (student, teacher) if greater_is_better else (teacher, student)
    return part / whole if whole > 0 else math.nan


def retention_above_chance(student: float, teacher: float, chance: float, greater_is_better: bool = True) -> float:
    """Share of the teacher's lead over chance that the student keeps: (student - chance) / (teacher - chance).

    With two balanced classes a student at 55 % of a teacher at 85 % retains 65 % of its accuracy, but 14 % of what it
    has learned. The formula is the same where lower is better. NaN where the teacher is no better than chance.

    >>> round(retention_above_chance(0.55, 0.85, 0.5), 4)
    0.1429
    """
    lead = teacher - chance if greater_is_better else chance - teacher
    return (student - chance) / (teacher - chance) if lead > 0 else math.nan


def _given(answers: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    answer, label = np.asarray(answers, bool), np.asarray(labels, bool)
    if answer.shape != label.shape or answer.ndim != 2 or not len(answer):
        raise ValueError(f"Answers and labels must both be (rows, labels), got {answer.shape} and {label.shape}.")
    return answer, label


def _judged(answers: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    answer, label = np.asarray(answers), np.asarray(labels)
    if answer.shape != label.shape:
        raise ValueError(f"Answers and labels must have the same shape, got {answer.shape} and {label.shape}.")
    kept = label != IGNORED
    if not kept.any():
        raise ValueError("There is nothing to judge: no rows, or every label is -100.")
    return answer[kept], label[kept]
