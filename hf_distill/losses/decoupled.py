"""Learning how sure the teacher is of the label apart from how it sees the other classes."""

from __future__ import annotations

from torch import Tensor

from hf_distill.activations import Activations, Needs
from hf_distill.batch import Batch
from hf_distill.functional import decoupled_kl_divergences
from hf_distill.losses.base import DistillationLoss
from hf_distill.losses.response import NO_CLASSES, require_factors, set_temperature
from hf_distill.schedules import Schedule

_UNDEFINED = {
    **NO_CLASSES,
    "two_classes": "beside the label only one other class is left, and nothing to compare. Use SoftTargetLoss",
}


class DecoupledLoss(DistillationLoss):
    """Decoupled knowledge distillation, DKD: `TCKD + beta * NCKD`, times temperature² (Zhao et al., 2022, section 3).

    TCKD compares how probable both models find the target class, the hard label; NCKD compares the distributions over
    all other classes. Forward KL is `TCKD + (1 - p) * NCKD` with the teacher's probability p of the label, so the
    surer the teacher, the less it tells about the other classes; here that factor is the constant `beta`. Averaged
    over the labelled positions; at least 0.

    Needs labels and at least three classes. Not defined for multi-label heads and regression. For spans the classes
    are the tokens, among which padding has no probability.

    Args:
        temperature: Divides the logits of both sides. The paper takes 4 on CIFAR-100 and 1 on ImageNet.
        beta: Factor of the other classes' part. The paper takes 8 on CIFAR-100 and 0.5 on ImageNet.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range.
    """

    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)
    over = "labels"
    needs_labels = True
    undefined_for = _UNDEFINED
    temperature: float
    citation = """@inproceedings{zhao2022decoupled,
  title={Decoupled Knowledge Distillation},
  author={Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun},
  booktitle={CVPR},
  year={2022}
}"""

    def __init__(self, temperature: float | Schedule = 2.0, beta: float = 1.0, weight: float | Schedule = 1.0) -> None:
        super().__init__(weight)
        set_temperature(self, temperature)
        require_factors(beta=beta)
        self.beta = beta

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        ours, theirs = batch.predictions(student, teacher, over="labels")
        if batch.labels is None:
            return batch.mean(ours.sum(-1), over="labels")  # nothing selected: a zero that still has a gradient
        labels = batch.select(batch.labels, over="labels")
        tckd, nckd = decoupled_kl_divergences(ours, theirs, labels, self.temperature)
        return batch.mean(tckd + self.beta * nckd, over="labels")

    def formula(self) -> str:
        return f"DKD, T={self.shown('temperature')}, beta={self.beta:g}"
