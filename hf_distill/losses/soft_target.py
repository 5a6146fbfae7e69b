"""Learning from the teacher's answers."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from hf_distill.activations import Activations, Needs
from hf_distill.batch import Batch
from hf_distill.functional import (
    binary_logits,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    reverse_kl_divergence,
)
from hf_distill.losses.base import DistillationLoss

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
POSITIONS = ("labels", "all")


class SoftTargetLoss(DistillationLoss):
    """Divergence between the softened answers of teacher and student, times temperature² (Hinton et al., 2015).

    Over the classes at each position; label by label for multi-label heads (averaged over rows and labels); squared
    error between the two predictions for regression, where temperature and divergence play no part.

    Args:
        temperature: Divides the logits of both sides; above 0. 1 leaves the answers as they are.
        divergence: `"forward_kl"` (the teacher is the target), `"reverse_kl"`, or `"jensen_shannon"`.
        beta: Mixture of the Jensen-Shannon divergence; 0 is forward KL, 1 reverse KL.
        positions: For token tasks: `"labels"` compares where there is a label (masked positions of a masked LM, first
            sub-words, completions), or at every real token if the batch has no labels; `"all"` at every real token.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range.
    """

    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)
    by_position = True
    citation = """@article{hinton2015distilling,
  title={Distilling the Knowledge in a Neural Network},
  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal={arXiv preprint arXiv:1503.02531},
  year={2015}
}"""

    def __init__(
        self,
        temperature: float = 2.0,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        positions: Literal["labels", "all"] = "labels",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}.")
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}.")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1] (0 is forward KL, 1 reverse KL), got {beta}.")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}.")
        self.temperature = temperature
        self.divergence = divergence
        self.beta = beta
        self.over = "predictions" if positions == "labels" else "all_predictions"

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        ours, theirs = batch.predictions(student, teacher, self.over)
        if batch.problem == "regression":
            return batch.mean(mean_squared_error(ours, theirs), self.over)
        if batch.problem == "multi_label_classification":
            ours, theirs = binary_logits(ours.squeeze(-1)), binary_logits(theirs.squeeze(-1))  # (N, 2)
        return batch.mean(self._compare(ours, theirs), self.over)

    def _compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return kl_divergence(ours, theirs, self.temperature)
        if self.divergence == "reverse_kl":
            return reverse_kl_divergence(ours, theirs, self.temperature)
        return jensen_shannon_divergence(ours, theirs, self.temperature, self.beta)

    def formula(self) -> str:
        beta = f", beta={self.beta:g}" if self.divergence == "jensen_shannon" else ""
        return f"{self.divergence}, T={self.temperature:g}{beta}"
