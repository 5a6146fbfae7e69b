"""How far confidence is from accuracy.

Never `import a, b` here: `evaluate` reads the imports line by line and cannot offline.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_distill.metrics.scores import expected_calibration_error

DESCRIPTION = """
Expected calibration error (Guo et al., 2017, "On Calibration of Modern Neural Networks", equation 3): the mean of
|accuracy - confidence| over bins of equal width, weighted by their rows.
"""
CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""
INPUTS = """
Args:
    predictions: Probabilities of all classes, a row for each answer.
    references: Right classes; rows of -100 are left out.
    bins: How many bins, 15 unless told.
Returns:
    expected_calibration_error: From 0 to 1; 0 is calibrated.
Examples:
    >>> ece = evaluate.load("expected_calibration_error")
    >>> ece.compute(predictions=[[0.75, 0.25], [0.75, 0.25]], references=[0, 0])
    {'expected_calibration_error': 0.25}
"""


class ExpectedCalibrationError(evaluate.Metric):
    """Mean gap between confidence and accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[Any], references: list[int], bins: int = 15) -> dict[str, float]:
        probabilities, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        kept = labels != -100
        right = probabilities[kept].argmax(-1) == labels[kept]
        return {"expected_calibration_error": expected_calibration_error(probabilities[kept].max(-1), right, bins)}
