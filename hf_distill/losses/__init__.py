"""The losses, one a file. A loss sees activations, never models; write your own by deriving from
`DistillationLoss`.
"""

from hf_distill.losses.attention import AttentionLoss
from hf_distill.losses.base import DistillationLoss, LossTerms
from hf_distill.losses.decoupled import DecoupledLoss
from hf_distill.losses.dist import DISTLoss
from hf_distill.losses.hard_label import HardLabelLoss, hard_label_names
from hf_distill.losses.hidden_state import HiddenStateLoss
from hf_distill.losses.logit_mse import LogitMSELoss
from hf_distill.losses.ranking import RankingLoss
from hf_distill.losses.soft_target import SoftTargetLoss

__all__ = [
    "AttentionLoss",
    "DISTLoss",
    "DecoupledLoss",
    "DistillationLoss",
    "HardLabelLoss",
    "HiddenStateLoss",
    "LogitMSELoss",
    "LossTerms",
    "RankingLoss",
    "SoftTargetLoss",
    "hard_label_names",
]
