"""Share of answers that are the teacher's.

Never `import a, b` here: `evaluate` reads the imports line by line and cannot offline.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_distill.metrics.scores import agreement

DESCRIPTION = """
Agreement: the share of the student's answers that are the teacher's, right or wrong.
"""
INPUTS = """
Args:
    predictions: The student's classes, a list, or a list of lists for tokens.
    references: The teacher's classes, of the same shape; what is -100 here is left out.
Returns:
    agreement: Share of equal answers, from 0 to 1.
Examples:
    >>> agreement = evaluate.load("agreement")
    >>> agreement.compute(predictions=[0, 1, 1], references=[0, 0, 1])
    {'agreement': 0.666...}
"""


class Agreement(evaluate.Metric):
    """Share of answers that are the teacher's."""

    def _info(self) -> evaluate.MetricInfo:
        one, several = datasets.Value("int64"), datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in (one, several)],
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        answers, labels = (np.concatenate([np.atleast_1d(row) for row in side]) for side in (predictions, references))
        return {"agreement": agreement(answers, labels)}
