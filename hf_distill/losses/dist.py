"""Learning how answers relate, not what they are."""

from __future__ import annotations

from torch import Tensor

from hf_distill.functional import at_least_fp32, pearson_distance
from hf_distill.losses.response import (
    NO_CLASSES,
    NO_MEAN_OVER_SPANS,
    Positions,
    ResponseLoss,
    require_factors,
    set_temperature,
)
from hf_distill.schedules import Schedule


class DISTLoss(ResponseLoss):
    """Pearson distance of the answers' probabilities, within each answer and across answers (Huang et al., 2022).

    With the softened probabilities of N answers as a matrix (N, V), the sum of

    - `inter_class_weight` times the mean over the rows of `1 - correlation(student's row, teacher's row)`,
    - `intra_class_weight` times the mean over the columns of `1 - correlation(student's column, teacher's column)`.

    Each mean lies in [0, 2]. A correlation does not see scale, so the student need not reach the teacher's confidence.

    The columns couple the N answers of a micro-batch (rows; positions in token tasks): under accumulation and on
    several processes the second part is the average over micro-batches, weighted by their positions, and not the value
    of the whole window. A micro-batch with one answer says nothing there and adds 0, so this part needs micro-batches
    of many rows. With two classes a row's correlation is always 1 or -1, so only the columns teach.

    Not defined for multi-label heads, regression and spans.

    Args:
        temperature: Divides the logits of both sides. The value is not multiplied by its square: the gradient of a
            correlation does not fall as the temperature rises.
        inter_class_weight: Factor of the rows' part; the paper's beta.
        intra_class_weight: Factor of the columns' part; the paper's gamma.
        positions: For token tasks: `"labels"` compares where there is a label, or at every real token if the batch has
            no labels; `"all"` at every real token.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range.
    """

    temperature: float
    citation = """@inproceedings{huang2022knowledge,
  title={Knowledge Distillation from A Stronger Teacher},
  author={Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
  booktitle={NeurIPS},
  year={2022}
}"""

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        inter_class_weight: float = 1.0,
        intra_class_weight: float = 1.0,
        positions: Positions = "labels",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(positions, weight)
        set_temperature(self, temperature)
        require_factors(inter_class_weight=inter_class_weight, intra_class_weight=intra_class_weight)
        self.inter_class_weight = inter_class_weight
        self.intra_class_weight = intra_class_weight
        self.couples_rows = intra_class_weight > 0
        self.undefined_for = {**NO_CLASSES, **NO_MEAN_OVER_SPANS}
        if not self.couples_rows:
            self.undefined_for["two_classes"] = (
                "two probabilities always correlate by 1 or -1. Set intra_class_weight above 0"
            )

    def compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        # What is all but impossible in every row is constant: its z-scores would be of rounding errors.
        q, p = (_nothing_below((at_least_fp32(logits) / self.temperature).softmax(-1)) for logits in (ours, theirs))
        values = self.inter_class_weight * pearson_distance(q, p)
        if self.couples_rows and len(q) > 0:
            # One value for all answers: the mean counts it once for each, which is its share of the window.
            values = values + self.intra_class_weight * pearson_distance(q.T, p.T).mean()
        return values

    def formula(self) -> str:
        parts = f"inter-class={self.inter_class_weight:g}, intra-class={self.intra_class_weight:g}"
        return f"DIST, T={self.shown('temperature')}, {parts}"


def _nothing_below(probabilities: Tensor, least: float = 1e-30) -> Tensor:
    return probabilities.masked_fill(probabilities < least, 0.0)
