"""Share of a teacher's score that its students keep.

Never `import a, b` here: `evaluate` reads the imports line by line and cannot offline.
"""

from statistics import fmean
from typing import Any

import datasets
import evaluate

from hf_distill.metrics.scores import retention, retention_above_chance

DESCRIPTION = """
Retention: the share of the teacher's score that a student keeps, student / teacher; teacher / student where lower is
better. With `chance` also the share of the teacher's lead over chance, (student - chance) / (teacher - chance).
"""
INPUTS = """
Args:
    predictions: Scores of the student, for example its accuracy, one a seed.
    references: Scores of the teacher, one for each of them.
    greater_is_better: False for a loss or an error.
    chance: Score of who has learned nothing; adds `retention_above_chance`.
Returns:
    retention: The mean over the scores; NaN where the quotient means nothing.
    retention_above_chance: Likewise, where `chance` is given.
Examples:
    >>> retention = evaluate.load("retention")
    >>> retention.compute(predictions=[0.8], references=[0.9], chance=0.5)
    {'retention': 0.888..., 'retention_above_chance': 0.75}
"""


class Retention(evaluate.Metric):
    """Student's score by teacher's score."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        greater_is_better: bool = True,
        chance: float | None = None,
    ) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        result = {"retention": fmean(retention(s, t, greater_is_better) for s, t in pairs)}
        if chance is not None:
            above = (retention_above_chance(s, t, chance, greater_is_better) for s, t in pairs)
            result["retention_above_chance"] = fmean(above)
        return result
