"""What a student costs, what each loss does to it, and its model card."""

from hf_distill.reports.gradients import GradientShare, gradient_shares

__all__ = ["GradientShare", "gradient_shares"]
