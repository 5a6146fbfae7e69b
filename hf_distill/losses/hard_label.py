"""The task's own loss on the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_distill.activations import Activations, Needs
from hf_distill.batch import Batch
from hf_distill.functional import at_least_fp32
from hf_distill.losses.base import DistillationLoss, LossTerms
from hf_distill.schedules import Schedule


class HardLabelLoss(DistillationLoss):
    """What the student would be trained on without a teacher, averaged over the labelled positions.

    Cross-entropy for one class a position, binary cross-entropy for multi-label heads (averaged over rows and labels),
    squared error for regression. Positions labelled -100 (NaN for regression) do not count. For spans the padding is
    no possible answer.

    Args:
        weight: Factor of this term.
        label_smoothing: Share of the target that is spread evenly over all classes (Szegedy et al., 2016, section 7).

    Raises:
        ValueError: If `label_smoothing` is outside [0, 1).
    """

    student_needs = Needs(logits=True)
    teacher_needs = Needs()
    over = "labels"
    needs_labels = True
    by_position = True

    def __init__(self, weight: float | Schedule = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        if label_smoothing:
            reason = (
                "label smoothing spreads a target over classes, one of which is right; a regression has none, of "
                "several labels each is a question of its own, and those of a span are its tokens, padding too. Set "
                "label_smoothing_factor=0"
            )
            self.undefined_for = {"regression": reason, "multi_label_classification": reason, "span": reason}

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        logits = at_least_fp32(batch.select(student.logits, over="labels"))  # (N, V), or (N,)
        if batch.labels is None:
            return batch.mean(logits.flatten(), over="labels")  # nothing selected: a zero that still has a gradient
        labels = batch.select(batch.labels, over="labels")  # (N,)
        if batch.problem != "single_label_classification":
            labels = labels.to(logits.dtype)
        if batch.problem == "regression":
            return batch.mean((logits - labels).square(), over="labels")
        if batch.problem == "multi_label_classification":
            return batch.mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), over="labels")
        smoothing = self.label_smoothing
        return batch.mean(F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing), over="labels")

    def formula(self) -> str:
        smoothing = f", smoothing={self.label_smoothing:g}" if self.label_smoothing else ""
        return f"task loss on labels{smoothing}"


def hard_label_names(losses: LossTerms) -> list[str]:
    """The names of the active terms that learn from labels."""
    return [name for name, loss in losses.active().items() if isinstance(loss, HardLabelLoss)]
