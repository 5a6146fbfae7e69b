"""What the losses on answers have in common: which positions they compare, and where they have no meaning."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from hf_distill.activations import Activations, Needs
from hf_distill.batch import Batch
from hf_distill.losses.base import DistillationLoss
from hf_distill.schedules import Schedule

Positions = Literal["labels", "all"]
POSITIONS = ("labels", "all")

# Reasons for `undefined_for`.
NO_CLASSES = {
    "regression": "it compares classes, and a regression has none. Use SoftTargetLoss or LogitMSELoss",
    "multi_label_classification": (
        "it compares the classes of one answer, and each label of a multi-label head is an answer of its own. Use "
        "SoftTargetLoss or LogitMSELoss"
    ),
}
NO_MEAN_OVER_SPANS = {
    "span": (
        "it averages over classes, and those of a span are its tokens, padding too. Use SoftTargetLoss, in which "
        "padding has no probability"
    )
}


class ResponseLoss(DistillationLoss):
    """A loss on the answers of both models, one value a position: derive from it and define `compare`.

    Args:
        positions: For token tasks: `"labels"` compares where there is a label (masked positions of a masked LM, first
            sub-words, completions), or at every real token if the batch has no labels; `"all"` at every real token.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range.
    """

    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)

    def __init__(self, positions: Positions = "labels", weight: float | Schedule = 1.0) -> None:
        super().__init__(weight)
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}.")
        self.over = "predictions" if positions == "labels" else "all_predictions"

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        ours, theirs = batch.predictions(student, teacher, self.over)
        return batch.mean(self.compare(ours, theirs), self.over)

    def compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Shape: (N, V), (N, V) -> (N,)."""
        raise NotImplementedError(f"{type(self).__name__} must define compare(ours, theirs).")


def set_temperature(loss: DistillationLoss, temperature: float | Schedule) -> None:
    """Give a loss its temperature.

    Raises:
        ValueError: If it is, at any time, not a finite number above 0.
    """
    number = isinstance(temperature, (int, float, Schedule))
    if not number or not all(math.isfinite(x) and x > 0 for x in loss.schedule("temperature", temperature)):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}.")


def require_factors(**factors: float) -> None:
    """Refuse factors of a loss' parts that are negative, not finite, or all 0.

    Raises:
        ValueError: Naming the first that is wrong.
    """
    for name, value in factors.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    if not any(factors.values()):
        raise ValueError(f"At least one of {', '.join(factors)} must be above 0.")
