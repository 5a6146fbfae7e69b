"""The losses, one a file. A loss sees activations, never models; write your own by deriving from
`DistillationLoss`.
"""

from hf_distill.losses.attention import AttentionLoss
from hf_distill.losses.attention_relations import AttentionRelationLoss
from hf_distill.losses.base import DistillationLoss, LossTerms, evaluate_losses, refuse_top_k
from hf_distill.losses.cka import CKALoss
from hf_distill.losses.contrastive import ContrastiveLoss
from hf_distill.losses.decoupled import DecoupledLoss
from hf_distill.losses.dist import DISTLoss
from hf_distill.losses.hard_label import HardLabelLoss, hard_label_names
from hf_distill.losses.hidden_state import HiddenStateLoss
from hf_distill.losses.lelp import LELPLoss
from hf_distill.losses.logit_mse import LogitMSELoss
from hf_distill.losses.pooled import PooledLoss
from hf_distill.losses.ranking import RankingLoss
from hf_distill.losses.relational import RelationalAngleLoss, RelationalDistanceLoss
from hf_distill.losses.similarity_preserving import SimilarityPreservingLoss
from hf_distill.losses.soft_target import SoftTargetLoss

__all__ = [
    "AttentionLoss",
    "AttentionRelationLoss",
    "CKALoss",
    "ContrastiveLoss",
    "DISTLoss",
    "DecoupledLoss",
    "DistillationLoss",
    "HardLabelLoss",
    "HiddenStateLoss",
    "LELPLoss",
    "LogitMSELoss",
    "LossTerms",
    "PooledLoss",
    "RankingLoss",
    "RelationalAngleLoss",
    "RelationalDistanceLoss",
    "SimilarityPreservingLoss",
    "SoftTargetLoss",
    "evaluate_losses",
    "hard_label_names",
    "refuse_top_k",
]
