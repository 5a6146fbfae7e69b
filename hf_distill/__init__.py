"""Distil a large Transformers model into a small one: `DistillationTrainer` is `Trainer` plus a teacher."""

from hf_distill.layer_proposal import propose_layer_mapping
from hf_distill.losses import DistillationLoss
from hf_distill.mapping import LayerMapping
from hf_distill.schedules import Schedule
from hf_distill.students import create_student, trim_vocabulary
from hf_distill.teachers import cache_teacher_outputs
from hf_distill.trainer import DistillationTrainer
from hf_distill.training_args import DistillationTrainingArguments

__version__ = "0.1.0.dev0"

__all__ = [
    "DistillationLoss",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "LayerMapping",
    "Schedule",
    "__version__",
    "cache_teacher_outputs",
    "create_student",
    "propose_layer_mapping",
    "trim_vocabulary",
]
