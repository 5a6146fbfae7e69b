"""The arguments of distillation; everything else is `TrainingArguments`."""

from __future__ import annotations

import ast
import copy
import math
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_distill.losses import AttentionLoss, DistillationLoss, HardLabelLoss, HiddenStateLoss, SoftTargetLoss
from hf_distill.losses.attention import ATTENTION_DISTANCES
from hf_distill.losses.hidden_state import DISTANCES, HIDDEN_STATE_POSITIONS
from hf_distill.losses.response import POSITIONS
from hf_distill.losses.soft_target import DIVERGENCES
from hf_distill.mapping import LayerMapping
from hf_distill.secrets import without_tokens

CACHED_LOGITS = ("auto", "full", "hidden_state", "top_k")
TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the distillation losses' weights and settings, and how the teacher is asked.

    The fields up to `layer_mapping` only build the default losses: `soft` (soft targets), `hard` (labels), `hidden`
    (hidden states) and `attention` (attention maps). Weights are independent factors, not shares of one; a weight of
    0 drops the term and whatever it would have cost. For other losses pass `losses=` to [`DistillationTrainer`]. The
    fields after it say which teacher is asked, where, and what is kept of its answers (`teacher_...`), whether
    padding is computed, whether the student writes texts of its own, and what an evaluation costs.

    Parses with `HfArgumentParser` from the command line, YAML and JSON.

    Raises:
        ValueError: If a weight is negative, all are 0, or a setting is out of range.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "layer_mapping",
        "teacher_model_init_kwargs",
        "student_generation_kwargs",
    ]

    temperature: float = field(
        default=2.0,
        metadata={"help": "Softens the answers of both models before they are compared; 1.0 leaves them as they are."},
    )
    soft_target_weight: float = field(
        default=1.0, metadata={"help": "Weight of the divergence between the teacher's and the student's answers."}
    )
    hard_label_weight: float = field(default=0.5, metadata={"help": "Weight of the task's own loss on the labels."})
    hidden_state_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance between mapped hidden states; 0 drops the term."}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance between mapped attention maps; 0 drops the term."}
    )
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "How answers are compared.", "choices": list(DIVERGENCES)},
    )
    beta: float = field(
        default=0.5,
        metadata={"help": "Mixture of divergence='jensen_shannon': 0 is forward KL, 1 reverse KL."},
    )
    skew: float = field(
        default=0.1,
        metadata={
            "help": "Share of the own side in the mixture of divergence='skewed_kl' or 'skewed_reverse_kl'; below 1."
        },
    )
    soft_target_positions: str = field(
        default="labels",
        metadata={
            "help": "Which positions of token tasks have soft targets: where there is a label, or all real tokens.",
            "choices": list(POSITIONS),
        },
    )
    hidden_state_distance: str = field(
        default="mse", metadata={"help": "How hidden states are compared.", "choices": list(DISTANCES)}
    )
    hidden_state_positions: str = field(
        default="all",
        metadata={
            "help": "Whether hidden states are compared at all real tokens or only at the first.",
            "choices": list(HIDDEN_STATE_POSITIONS),
        },
    )
    attention_distance: str = field(
        default="mse", metadata={"help": "How attention maps are compared.", "choices": list(ATTENTION_DISTANCES)}
    )
    layer_mapping: dict | str | None = field(
        default="uniform",
        metadata={
            "help": "Which hidden states are compared: 'uniform', 'first', 'last', or {student index: teacher index} "
            "as JSON; a list of teacher indices is averaged. Index 0 is the embedding output."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher, where no teacher_model is passed to the trainer."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher that is loaded by name."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of from_pretrained for a teacher that is loaded by name, as JSON, for example "
            '{"dtype": "bfloat16"}.'
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={"help": "Where the teacher runs, for example 'cuda:1' or 'cpu'; the student's device if unset."},
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision that the teacher computes in. 'auto' is its own; for a teacher cache bfloat16 where "
            "the device computes in it.",
            "choices": list(TEACHER_DTYPES),
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Ask the teacher about every row once, keep its answers in this directory, and learn from them; "
            "shared by seeds, students and runs."
        },
    )
    teacher_cache_dtype: str = field(
        default="float16",
        metadata={
            "help": "Precision of hidden states, attention maps and log-probabilities in the cache; full logits are "
            "kept in float32.",
            "choices": ["float16", "float32"],
        },
    )
    teacher_cache_logits: str = field(
        default="auto",
        metadata={
            "help": "What a cache keeps of a language model's logits: all of them ('full'), the last hidden state, of "
            "which the teacher's head makes them again ('hidden_state'), or the likeliest and the sum of the rest "
            "('top_k': smallest and fastest, biased). 'auto' is the hidden state where the head can be taken off. "
            "All but 'full' are kept at supervised positions only.",
            "choices": list(CACHED_LOGITS),
        },
    )
    teacher_cache_top_k: int = field(
        default=64, metadata={"help": "How many classes teacher_cache_logits='top_k' keeps at each position."}
    )
    teacher_batch_size: int = field(
        default=32, metadata={"help": "Rows that the teacher is asked about at once while the cache is filled."}
    )
    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Compute no padding: the blocks of the student, and of a teacher without a cache, run on one row "
            "of all real tokens, or the student on rows of like length where it cannot be packed; the loss stays the "
            "same. Unset means where it was measured to help: on the CPU."
        },
    )
    student_generation_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training batches in which the student writes what follows the prompts, and learns "
            "from what the teacher says of that (causal language models; needs hard_label_weight=0)."
        },
    )
    student_generation_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of generate for these batches, as JSON; 128 new tokens from the student's own "
            "distribution where nothing is said."
        },
    )
    eval_with_teacher: bool = field(
        default=True,
        metadata={
            "help": "Whether evaluation computes the distillation terms too, which asks the teacher for every batch."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_model_init_kwargs", "student_generation_kwargs"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a dict or JSON that starts with '{{', got {getattr(self, name)!r}.")
        if not 0.0 <= self.student_generation_share <= 1.0:
            raise ValueError(f"student_generation_share must lie in [0, 1], got {self.student_generation_share}.")
        choices = {
            "teacher_dtype": TEACHER_DTYPES,
            "teacher_cache_dtype": ("float16", "float32"),
            "teacher_cache_logits": CACHED_LOGITS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("teacher_batch_size", "teacher_cache_top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        self.layer_mapping = _with_integer_keys(self.layer_mapping)
        build_losses(self)  # a wrong value is told now, not after the models are loaded

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, tokens within `teacher_model_init_kwargs` left out too."""
        content = super().to_dict()
        return {**content, "teacher_model_init_kwargs": _safe(self.teacher_model_init_kwargs)}

    def __str__(self) -> str:
        shown = copy.copy(self)
        shown.teacher_model_init_kwargs = _safe(self.teacher_model_init_kwargs)
        return TrainingArguments.__str__(shown)

    __repr__ = __str__  # the one that `dataclass` makes would show hub_token


# The fields that only say how a default loss is built, with their defaults.
LOSS_FIELDS: dict[str, Any] = {
    f.name: f.default
    for f in fields(DistillationTrainingArguments)
    if f.name not in {inherited.name for inherited in fields(TrainingArguments)}
    and not f.name.startswith(("teacher_", "eval_", "padding_", "student_"))
}


def changed_loss_fields(args: TrainingArguments) -> dict[str, Any]:
    """The loss settings that differ from their defaults, and so contradict `losses=`."""
    return {
        name: getattr(args, name) for name, default in LOSS_FIELDS.items() if getattr(args, name, default) != default
    }


def build_losses(args: TrainingArguments) -> dict[str, DistillationLoss]:
    """The default losses by name, only those with a weight above 0. Plain `TrainingArguments` stand for the defaults.

    Raises:
        ValueError: If a weight is negative, all are 0, or a setting is out of range.
    """
    setting = SimpleNamespace(**{name: getattr(args, name, default) for name, default in LOSS_FIELDS.items()})
    _check_weights({name: value for name, value in vars(setting).items() if name.endswith("_weight")})
    losses: dict[str, DistillationLoss] = {
        "soft": SoftTargetLoss(
            temperature=setting.temperature,
            divergence=setting.divergence,
            beta=setting.beta,
            skew=setting.skew,
            positions=setting.soft_target_positions,
            weight=setting.soft_target_weight,
        ),
        "hard": HardLabelLoss(weight=setting.hard_label_weight, label_smoothing=args.label_smoothing_factor),
        "hidden": HiddenStateLoss(
            _with_integer_keys(setting.layer_mapping) or "uniform",
            distance=setting.hidden_state_distance,
            positions=setting.hidden_state_positions,
            weight=setting.hidden_state_weight,
        ),
        "attention": AttentionLoss(
            _with_integer_keys(setting.layer_mapping) or "uniform",
            distance=setting.attention_distance,
            weight=setting.attention_weight,
        ),
    }
    return {name: loss for name, loss in losses.items() if loss.weight > 0}


def _safe(kwargs: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
    return without_tokens(kwargs) if isinstance(kwargs, dict) else kwargs


def _check_weights(weights: dict[str, Any]) -> None:
    for name, weight in weights.items():
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {weight!r}.")
    if not any(weights.values()):
        raise ValueError(f"At least one weight must be above 0, got {weights}.")


def _with_integer_keys(mapping: dict[Any, Any] | str | None) -> dict[int, Any] | str | None:
    if isinstance(mapping, str) and mapping.startswith("{"):  # a hyper-parameter search turns dicts into strings
        mapping = ast.literal_eval(mapping)
    if not isinstance(mapping, dict):
        return mapping
    return dict(LayerMapping.parse(mapping).explicit)
