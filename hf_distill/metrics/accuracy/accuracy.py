"""Share of right answers.

Never `import a, b` here: `evaluate` reads the imports line by line and cannot offline.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_distill.metrics.scores import accuracy

DESCRIPTION = """
Accuracy: the share of right answers.
"""
INPUTS = """
Args:
    predictions: Answered classes, a list, or a list of lists for tokens.
    references: Right classes, of the same shape; what is -100 here is left out.
Returns:
    accuracy: Share of right answers, from 0 to 1.
Examples:
    >>> accuracy = evaluate.load("accuracy")
    >>> accuracy.compute(predictions=[0, 1, 1], references=[0, 0, 1])
    {'accuracy': 0.666...}
"""


class Accuracy(evaluate.Metric):
    """Share of right answers."""

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
        return {"accuracy": accuracy(answers, labels)}
