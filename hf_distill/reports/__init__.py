"""What a student keeps of its teacher, what it costs, what each loss does to it, and its model card."""

from hf_distill.reports.gradients import GradientShare, gradient_shares
from hf_distill.reports.measure import Cost, Latency, measure_cost
from hf_distill.reports.quality import Metric
from hf_distill.reports.report import DistillationReport

__all__ = [
    "Cost",
    "DistillationReport",
    "GradientShare",
    "Latency",
    "Metric",
    "gradient_shares",
    "measure_cost",
]
