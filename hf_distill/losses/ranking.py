"""Learning which class the teacher puts before which."""

from __future__ import annotations

from torch import Tensor

from hf_distill.functional import pairwise_ranking_divergence
from hf_distill.losses.response import (
    NO_CLASSES,
    NO_MEAN_OVER_SPANS,
    Positions,
    ResponseLoss,
    set_temperature,
)
from hf_distill.schedules import Schedule

_UNDEFINED = {**NO_CLASSES, **NO_MEAN_OVER_SPANS}


class RankingLoss(ResponseLoss):
    """How differently both models rank pairs of classes, averaged over positions and pairs, times temperature².

    RankNet (Burges et al., 2005, section 3) with the teacher as the judge: for each pair of the teacher's `top_k`
    classes the KL between `sigmoid(margin / temperature)` of the teacher and of the student, where a margin is the
    difference of two logits. At least 0, and 0 where the student keeps every margin. Unlike a divergence over all
    classes it gives improbable classes among the `top_k` as much weight as probable ones. With two classes it is
    forward KL.

    Not defined for multi-label heads, regression and spans.

    Args:
        temperature: Divides the margins of both sides; 1 leaves them as they are.
        top_k: How many classes are ranked, those that the teacher likes best; all where there are fewer. Each position
            costs `top_k * (top_k - 1) / 2` pairs.
        positions: For token tasks: `"labels"` compares where there is a label, or at every real token if the batch has
            no labels; `"all"` at every real token.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range.
    """

    by_position = True
    undefined_for = _UNDEFINED
    temperature: float
    citation = """@inproceedings{burges2005learning,
  title={Learning to Rank using Gradient Descent},
  author={Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt and Hamilton, Nicole \
and Hullender, Greg},
  booktitle={ICML},
  year={2005}
}"""

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        top_k: int = 16,
        positions: Positions = "labels",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(positions, weight)
        set_temperature(self, temperature)
        if top_k < 2:
            raise ValueError(f"top_k must be at least 2, a pair of classes, got {top_k}.")
        self.top_k = top_k

    def compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return pairwise_ranking_divergence(ours, theirs, self.temperature, self.top_k)

    def formula(self) -> str:
        return f"pairwise ranking, T={self.shown('temperature')}, top_k={self.top_k}"
