"""The losses, one a file. A loss sees activations, never models; write your own by deriving from
`DistillationLoss`.
"""

from hf_distill.losses.attention import AttentionLoss
from hf_distill.losses.base import DistillationLoss, LossTerms, evaluate_losses
from hf_distill.losses.hard_label import HardLabelLoss, hard_label_names
from hf_distill.losses.hidden_state import HiddenStateLoss
from hf_distill.losses.soft_target import SoftTargetLoss

__all__ = [
    "AttentionLoss",
    "DistillationLoss",
    "HardLabelLoss",
    "HiddenStateLoss",
    "LossTerms",
    "SoftTargetLoss",
    "evaluate_losses",
    "hard_label_names",
]
