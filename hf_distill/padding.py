"""Whether, and how, a run computes no padding: decided once, on the models in hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import logging

from hf_distill.activations import Head
from hf_distill.batch import Batch
from hf_distill.batching import padding_is_inert
from hf_distill.heads import core_model, in_eval_mode
from hf_distill.output_head import without_head
from hf_distill.packing import find_stack
from hf_distill.teachers import OnlineTeacher

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer

logger = logging.get_logger(__name__)


def drop_padding(trainer: DistillationTrainer, student: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Decide it for both models (`padding_free`), tried on the first rows; unset means on the CPU.

    Args:
        trainer: Gets `padding_free`, whether the student may run on groups of rows of like length, and `stack`, the
            list of its blocks that may run on one row of all real tokens.
        student: The student.
        inputs: The first rows of the training data.

    Raises:
        ValueError: If it was asked for and would change the result.
    """
    args = trainer.args
    asked = getattr(args, "padding_free", None)
    wanted = args.device.type == "cpu" and not args.torch_compile if asked is None else asked
    trainer.padding_free, trainer.stack = False, None
    for teacher in getattr(trainer.teacher, "members", [trainer.teacher]):
        if isinstance(teacher, OnlineTeacher):
            teacher.packs = bool(wanted) and trainer.cache_keeper is None  # a cache's batches are of like length
    if trainer.losses.student_needs.qkv:
        if asked:
            raise ValueError(
                "padding_free=True runs the student on parts of a batch, whose queries, keys and values cannot be put "
                "together. Leave it unset, or drop the loss on attention relations."
            )
        return
    if not wanted or "input_ids" not in inputs:
        return
    with in_eval_mode(student), without_head(student, trainer.heads_off.student):
        _try(trainer, student, trainer._inputs_for("student", inputs))
    if asked and not trainer.padding_free:
        raise ValueError(
            f"padding_free=True would change what {type(core_model(student)).__name__} computes: its answers depend "
            "on padding, it returns what cannot be put together, or batches are not padded on the right with an "
            "attention_mask. Leave padding_free unset."
        )


def labels_on_padding(batch: Batch, inputs: Mapping[str, Any], head: Head) -> bool:
    """Whether a label stands at padding and is not -100: plain `Trainer` learns it, so padding must be computed."""
    mask = inputs.get("attention_mask")
    if mask is None or batch.labels is None or head.kind in ("rows", "span"):
        return False
    labelled = batch.masks["labels"]
    found = bool((labelled & ~mask.bool()[:, : labelled.shape[1]]).any())  # of a causal LM the token before the label
    if found:
        logger.warning_once(
            "Labels stand at padding and are learned, as by Trainer. Set them to -100 if that is not meant; padding "
            "is then left out of the student's batches, which is faster."
        )
    return found


def _try(trainer: DistillationTrainer, student: nn.Module, inputs: Mapping[str, Any]) -> None:
    arguments, head = trainer.losses.student_needs.forward_arguments(), trainer.head
    pad = getattr(core_model(student).config, "pad_token_id", None) or 0
    trainer.padding_free = padding_is_inert(student, inputs, arguments, head, pad)
    # The head sees padding where only the blocks are packed: too dear with a whole vocabulary.
    wide_head = head.kind in ("masked_lm", "causal_lm") and trainer.heads_off.student is None
    if trainer.padding_free and not wide_head and not trainer.args.torch_compile:
        trainer.stack = find_stack(student, inputs, arguments, head)
