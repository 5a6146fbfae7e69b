"""The two models of a training beside each other: what the head means, and how to read the teacher's answers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from hf_distill.activations import Head, Needs
from hf_distill.alignment import (
    Alignment,
    agree_on_task,
    check_image_processors,
    check_length,
    class_order,
    shared_vocabulary,
)
from hf_distill.heads import core_model, has_label_names, head_of
from hf_distill.losses import LossTerms
from hf_distill.teachers import EMATeacher, Teacher
from hf_distill.teachers.loading import load_processing_class


def align(
    student: nn.Module, teacher: Teacher | None, ours: Any, theirs: Any, revision: str | None
) -> tuple[Head, Alignment]:
    """Compare two models and their tokenizers: what the student's head means, and how to read the teacher's answers.

    Args:
        student: The student.
        teacher: The teacher, or `None` where only stored answers are used, taken to be in the student's order.
        ours: The student's tokenizer or image processor, if known.
        theirs: The teacher's; loaded from beside its weights if `None`.
        revision: Which revision of the teacher to load it from.
    """
    head = head_of(student)
    for member in getattr(teacher, "members", ())[1:]:  # of an ensemble: each must agree as the first must
        align(student, member, ours, theirs, revision)
    if teacher is None or teacher.config is None:
        return head, Alignment()
    config = core_model(student).config
    teacher_head = getattr(teacher, "head", None)
    if teacher_head is not None:
        head = agree_on_task(head, teacher_head)
    order = None
    if has_label_names(student) and head.has_named_outputs:
        order = class_order(config.id2label, teacher.config.id2label)
    ours = _text_or_image(ours)
    follows = isinstance(teacher, EMATeacher)
    theirs = _text_or_image(theirs) or (ours if follows else load_processing_class(teacher, ours, revision))
    vocabulary = None
    if getattr(core_model(student), "main_input_name", "input_ids") == "input_ids":
        known = [p if isinstance(p, PreTrainedTokenizerBase) else None for p in (ours, theirs)]
        vocabulary = shared_vocabulary(config, teacher.config, *known)
        check_length(config, teacher.config, known[0])
    elif isinstance(ours, BaseImageProcessor) and theirs is not None:
        check_image_processors(ours, theirs)
    is_language_model = head.kind in ("masked_lm", "causal_lm")
    return head, Alignment(order, vocabulary if is_language_model else None)


def align_answers(
    student: nn.Module, teacher: Teacher | None, losses: LossTerms, aligned: str = "rows"
) -> tuple[Head, Alignment]:
    """As [`align`], for two models that do not share a tokenizer.

    Args:
        student: The student.
        teacher: The teacher.
        losses: What is compared.
        aligned: The kind of head whose answers the collator aligns.

    Raises:
        ValueError: If a loss would compare tokens that nothing aligns.
    """
    head = head_of(student)
    if head.kind != aligned:
        raise ValueError(
            f"Student and teacher have tokenizers of their own, and the collator aligns answers of kind {aligned!r}, "
            f"but the head is of kind {head.kind!r}. Use TwoTokenizersCollator for answers about rows, "
            "WordAlignedCollator for token classification, SpanAlignedCollator for question answering; language "
            "models need one tokenizer."
        )
    for name, loss in losses.active().items():
        more = loss.teacher_needs != Needs(logits=loss.teacher_needs.logits)
        if more and not (loss.pools_tokens and head.kind == "rows"):
            raise ValueError(
                f"Student and teacher have tokenizers of their own, but the loss {name!r} ({type(loss).__name__}) "
                "compares the teacher's hidden states or attention token by token. Use losses on logits, and for "
                "answers about rows those that pool hidden states (CKALoss, ContrastiveLoss, LELPLoss)."
            )
    members = [] if teacher is None else getattr(teacher, "members", [teacher])
    order = None
    for member in reversed(members):  # an ensemble answers in the order of its first
        if getattr(member, "config", None) is None:
            continue
        head = agree_on_task(head, member.head) if hasattr(member, "head") else head
        if has_label_names(student) and head.has_named_outputs:
            order = class_order(core_model(student).config.id2label, member.config.id2label)
    return head, Alignment(order)


def _text_or_image(processor: Any) -> Any:
    """The part of a multi-part processor that can be compared."""
    for part in ("tokenizer", "image_processor"):
        if not isinstance(processor, PreTrainedTokenizerBase) and hasattr(processor, part):
            return getattr(processor, part)
    return processor
