"""Unweighted mean of the classes' F1.

Never `import a, b` here: `evaluate` reads the imports line by line and cannot offline.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_distill.metrics.scores import macro_f1

DESCRIPTION = """
Macro F1: the unweighted mean of the classes' F1 = 2 TP / (2 TP + FP + FN).
"""
INPUTS = """
Args:
    predictions: Answered classes, a list, or a list of lists for tokens.
    references: Right classes, of the same shape; what is -100 here is left out.
Returns:
    macro_f1: From 0 to 1.
Examples:
    >>> macro_f1 = evaluate.load("macro_f1")
    >>> macro_f1.compute(predictions=[0, 1, 1], references=[0, 0, 1])
    {'macro_f1': 0.666...}
"""


class MacroF1(evaluate.Metric):
    """Unweighted mean of the classes' F1."""

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
        return {"macro_f1": macro_f1(answers, labels)}
