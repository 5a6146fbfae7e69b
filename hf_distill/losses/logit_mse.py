"""Learning the teacher's logits themselves."""

from __future__ import annotations

from torch import Tensor

from hf_distill.functional import mean_squared_error
from hf_distill.losses.response import NO_MEAN_OVER_SPANS, ResponseLoss


class LogitMSELoss(ResponseLoss):
    """Squared error between the logits of both models, averaged over positions and classes.

    `mean_c (student_c - teacher_c)²` with the logits as they are (Ba and Caruana, 2014, section 2), at least 0. Knows
    no temperature; the student must reach the teacher's scale too. For multi-label heads averaged over rows and
    labels, for regression the squared error of the prediction. Not defined for spans, whose classes are tokens.

    Args:
        positions: For token tasks: `"labels"` compares where there is a label, or at every real token if the batch has
            no labels; `"all"` at every real token.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range.
    """

    by_position = True
    undefined_for = NO_MEAN_OVER_SPANS
    citation = """@inproceedings{ba2014deep,
  title={Do Deep Nets Really Need to be Deep?},
  author={Ba, Jimmy and Caruana, Rich},
  booktitle={NeurIPS},
  year={2014}
}"""

    def compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return mean_squared_error(ours, theirs)

    def formula(self) -> str:
        return "mse of logits"
