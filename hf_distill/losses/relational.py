"""Learning the distances and angles between rows (RKD)."""

from __future__ import annotations

from torch import Tensor

from hf_distill.losses.pooled import PooledLoss
from hf_distill.similarity import relational_angle, relational_distance

_CITATION = """@inproceedings{park2019relational,
  title={Relational Knowledge Distillation},
  author={Park, Wonpyo and Kim, Dongju and Lu, Yan and Cho, Minsu},
  booktitle={CVPR},
  year={2019}
}"""


class RelationalDistanceLoss(PooledLoss):
    """Huber distance between the two models' distances between rows, each relative to its mean; at least 0.

    RKD-D (Park et al., 2019, section 3.2.1), averaged over the pairs of different rows. The paper weighs distance and
    angle as 1 to 2.

    Args:
        layer_mapping: Which hidden states are compared, as in [`HiddenStateLoss`]; the final ones by default.
        pooling: What stands for a row: `"mean"` of its real tokens, or the `"first"`.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is unknown; in `setup`, if the layers cannot be compared.
    """

    called = "relative distances"
    citation = _CITATION

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relational_distance(student, teacher)


class RelationalAngleLoss(PooledLoss):
    """Huber distance between the cosines of the angles that three rows span in the two models; in [0, 1.5].

    RKD-A (Park et al., 2019, section 3.2.2), averaged over the triplets of different rows. Memory grows with the third
    power of the rows in a micro-batch.

    Args:
        layer_mapping: Which hidden states are compared, as in [`HiddenStateLoss`]; the final ones by default.
        pooling: What stands for a row: `"mean"` of its real tokens, or the `"first"`.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is unknown; in `setup`, if the layers cannot be compared.
    """

    called = "angles"
    citation = _CITATION

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relational_angle(student, teacher)
