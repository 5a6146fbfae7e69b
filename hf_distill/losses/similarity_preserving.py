"""Learning which rows the teacher finds alike."""

from __future__ import annotations

from torch import Tensor

from hf_distill.losses.pooled import PooledLoss
from hf_distill.similarity import similarity_preserving_distance


class SimilarityPreservingLoss(PooledLoss):
    """Distance between the two models' matrices of similarities between rows, at least 0 (Tung and Mori, 2019).

    The paper flattens feature maps; here a row is one pooled vector. Values are small, at most 4 divided by the rows
    of a micro-batch: the paper's weight is 3000.

    Args:
        layer_mapping: Which hidden states are compared, as in [`HiddenStateLoss`]; the final ones by default.
        pooling: What stands for a row: `"mean"` of its real tokens, or the `"first"`.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is unknown; in `setup`, if the layers cannot be compared.
    """

    called = "similarity preserving"
    citation = """@inproceedings{tung2019similarity,
  title={Similarity-Preserving Knowledge Distillation},
  author={Tung, Frederick and Mori, Greg},
  booktitle={ICCV},
  year={2019}
}"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_preserving_distance(student, teacher)
