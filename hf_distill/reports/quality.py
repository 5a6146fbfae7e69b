"""What the report says about one model: how good its answers are, and how near to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from hf_distill.functional import binary_logits, kl_divergence
from hf_distill.metrics import scores
from hf_distill.reports.answers import TestRows, by_chunk, chosen
from hf_distill.reports.measure import Cost

ComputeMetrics = Callable[[Any], Mapping[str, float]]
Values = list[float]  # one a seed


@dataclass(frozen=True)
class Metric:
    """The number that retention is about.

    Attributes:
        name: Its name among a model's metrics.
        greater_is_better: False for errors and losses.
        chance: What who knows nothing of a row would get; `None` where unknown.
    """

    name: str
    greater_is_better: bool = True
    chance: float | None = None


@dataclass
class ModelResult:
    """What was measured on one model; lists have one value a seed.

    Attributes:
        name: What it is called in the tables.
        role: `"teacher"`, `"student"`, `"baseline"` (the same student without a teacher) or `"other"`.
        metrics: Name -> values, of the task.
        fidelity: Name -> values: retention, agreement and the like; empty for the teacher.
        class_accuracy: Each class's share of right answers, averaged over seeds; NaN for a class without rows.
        cost: Size, memory and speed, where measured.
    """

    name: str
    role: str
    metrics: dict[str, Values]
    fidelity: dict[str, Values] = field(default_factory=dict)
    class_accuracy: Values = field(default_factory=list)
    cost: Cost | None = None

    @property
    def seeds(self) -> int:
        """With how many seeds it was trained."""
        return len(next(iter(self.metrics.values())))


@dataclass(frozen=True)
class Gain:
    """How much better the distilled student is than the same student without a teacher, in units of the metric.

    Attributes:
        mean: Difference of the means over seeds; positive is better, also where lower values are.
        row_error: Standard error of that difference over the test rows, which both answer: what other rows of this
            kind would change; it knows nothing of other seeds. `None` where the metric is no mean over rows.
        seed_error: Standard error over seeds; `None` with a single seed on either side.
    """

    mean: float
    row_error: float | None
    seed_error: float | None

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors, both kinds together (their squares add up)."""
        known = [error for error in (self.row_error, self.seed_error) if error is not None]
        return bool(known) and abs(self.mean) > 2 * math.hypot(*known)


def task_metrics(rows: TestRows, logits: Tensor) -> tuple[dict[str, float], Tensor]:
    """The metrics of a task, and what each row adds to the default one. Shape: (N, V) or (N,) -> {}, (N,)."""
    if rows.is_regression:
        errors = logits.double() - rows.labels
        mse = errors.square()
        metrics = {"mse": mse.mean().item(), "mae": errors.abs().mean().item()}
        metrics["pearson"] = pearson(logits, rows.labels)
        return metrics, mse
    if rows.is_multi_label:
        return _of_several(rows, logits)
    answer = logits.argmax(-1)
    right = rows.right(logits).double()
    confidence = by_chunk(lambda part: part.softmax(-1).amax(-1), logits)
    metrics = {
        "accuracy": scores.accuracy(answer.numpy(), rows.labels.numpy()),
        "macro_f1": scores.macro_f1(answer.numpy(), rows.labels.numpy()),
        "ece": scores.expected_calibration_error(confidence.numpy(), right.numpy()),
    }
    return metrics, right


def _of_several(rows: TestRows, logits: Tensor) -> tuple[dict[str, float], Tensor]:
    """As [`task_metrics`], of rows with any number of labels."""
    given, labels = chosen(rows, logits), rows.labels
    sure = by_chunk(lambda part: binary_logits(part).softmax(-1).amax(-1), logits)
    metrics = {
        "accuracy": rows.right(logits).double().mean().item(),
        "micro_f1": scores.micro_f1(given.numpy(), labels.numpy()),
        "macro_f1": scores.macro_f1_of_labels(given.numpy(), labels.numpy()),
        "ece": scores.expected_calibration_error(sure.flatten().numpy(), (given == labels).flatten().numpy()),
    }
    both = (given.sum(-1) + labels.sum(-1)).double()
    apart = 2.0 * (given & labels).sum(-1).double() - metrics["micro_f1"] * both
    return metrics, metrics["micro_f1"] + apart / both.mean().clamp(min=1e-12)  # a ratio's, to first order


def _chance_of_several(labels: Tensor) -> float:
    """The micro F1 of giving every row the same labels: the most frequent ones, as many as are best."""
    counts = labels.sum(0).sort(descending=True).values.double()
    given = len(labels) * torch.arange(1, len(counts) + 1, dtype=torch.float64)
    return float((2 * counts.cumsum(0) / (given + counts.sum())).max())


def default_metric(rows: TestRows) -> Metric:
    """Accuracy, beside always giving the most frequent class; of several labels a row micro F1, beside always giving
    the same ones; or mean squared error, beside always giving the mean.
    """
    if rows.is_regression:
        return Metric("mse", greater_is_better=False, chance=rows.labels.var(correction=0).item())
    if rows.is_multi_label:
        return Metric("micro_f1", chance=_chance_of_several(rows.labels))
    return Metric("accuracy", chance=rows.class_counts.max().item() / len(rows.labels))


def fidelity(rows: TestRows, student: Tensor, teacher: Tensor) -> dict[str, float]:
    """How near one set of answers is to the teacher's. Shape: (N, V), (N, V) -> {}; (N,) for regression."""
    if rows.is_regression:
        distance = (student - teacher).double()
        return {
            "rms_to_teacher": distance.square().mean().sqrt().item(),
            "pearson_to_teacher": pearson(student, teacher),
        }
    ours, theirs = (chosen(rows, logits) for logits in (student, teacher))
    same = (ours == theirs).all(-1) if rows.is_multi_label else None
    agreement = scores.agreement(ours.numpy(), theirs.numpy()) if same is None else same.double().mean().item()
    return {"agreement": agreement, "kl_to_teacher": divergences(rows, student, teacher).double().mean().item()}


def divergences(rows: TestRows, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each answer; of several labels a row, of all together. Shape: (N, V) x 2 -> (N,)."""
    if rows.is_multi_label:
        student, teacher = binary_logits(student), binary_logits(teacher)
    return by_chunk(kl_divergence, student, teacher).reshape(len(student), -1).sum(-1)


def retained(metric: Metric, value: float, teacher: float) -> dict[str, float]:
    """Retention of the metric, and above chance where chance is known."""
    kept = {"retention": scores.retention(value, teacher, metric.greater_is_better)}
    if metric.chance is not None:
        above = scores.retention_above_chance(value, teacher, metric.chance, metric.greater_is_better)
        kept["retention_above_chance"] = above
    return kept


def class_accuracy(rows: TestRows, right: Tensor) -> Tensor:
    """Share of right answers among the rows of each class; NaN for a class without rows.

    Args:
        rows: The test rows.
        right: Whether each answer is right; of several labels a row, whether each label is. Averaged over seeds.

    Shape:
        (N,) or (N, V) -> (V,).
    """
    classes = len(rows.class_names)
    if rows.is_multi_label:
        return (right.double() * rows.labels).sum(0) / rows.class_counts
    hits = torch.zeros(classes, dtype=torch.float64).index_add_(0, rows.labels, right.double())
    return hits / rows.class_counts


def gain(metric: Metric, student: ModelResult, baseline: ModelResult, rows: Sequence[Tensor] | None) -> Gain:
    """The student's lead over the baseline.

    Args:
        metric: Which number is compared.
        student: The distilled student.
        baseline: The same student without a teacher.
        rows: What each test row adds to the metric, (N,), for student and baseline, averaged over seeds; `None` where
            the metric is no mean over rows.
    """
    sign = 1.0 if metric.greater_is_better else -1.0
    ours, theirs = student.metrics[metric.name], baseline.metrics[metric.name]
    row_error = seed_error = None
    if rows is not None and len(rows[0]) > 1:
        difference = rows[0] - rows[1]
        row_error = (difference.std() / math.sqrt(len(difference))).item()
    if min(len(ours), len(theirs)) > 1:
        seed_error = math.sqrt(stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs))
    return Gain(sign * (fmean(ours) - fmean(theirs)), row_error, seed_error)


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two vectors; NaN where one is constant. Shape: (N,), (N,) -> ().

    >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0, 9.0]))
    1.0
    """
    a, b = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return ((a * b).sum() / scale).item() if scale > 0 else math.nan
