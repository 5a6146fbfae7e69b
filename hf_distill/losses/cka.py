"""Learning a geometry of rows that is the teacher's up to rotation and scale."""

from __future__ import annotations

from torch import Tensor

from hf_distill.losses.pooled import PooledLoss
from hf_distill.similarity import linear_cka


class CKALoss(PooledLoss):
    """One minus the linear centred kernel alignment of the rows, in [0, 1] (Kornblith et al., 2019, section 3).

    0 where the student's rows are a rotated, scaled and shifted copy of the teacher's, so the widths may differ and
    nothing is projected. Batches with few rows say little: see [`linear_cka`] for its bias.

    Args:
        layer_mapping: Which hidden states are compared, as in [`HiddenStateLoss`]; the final ones by default.
        pooling: What stands for a row: `"mean"` of its real tokens, or the `"first"`.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is unknown; in `setup`, if the layers cannot be compared.
    """

    called = "1 - CKA"
    citation = """@inproceedings{kornblith2019similarity,
  title={Similarity of Neural Network Representations Revisited},
  author={Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey},
  booktitle={ICML},
  year={2019}
}"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1.0 - linear_cka(student, teacher)
