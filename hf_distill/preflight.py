"""What is looked at before the first step: the two models beside each other, and one dry forward of both."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, Trainer

from hf_distill.activations import Activations, Head, Needs, Shapes
from hf_distill.alignment import (
    Alignment,
    agree_on_task,
    check_image_processors,
    check_length,
    class_order,
    shared_vocabulary,
)
from hf_distill.batch import Batch
from hf_distill.heads import core_model, has_label_names, head_of, use_eager_attention
from hf_distill.losses import LossTerms, hard_label_names
from hf_distill.teachers import TEACHER_LOGITS, OnlineTeacher, Teacher
from hf_distill.teachers.loading import load_processing_class

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer


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
    if teacher is None or teacher.config is None:
        return head, Alignment()
    config = core_model(student).config
    teacher_head = getattr(teacher, "head", None)
    if teacher_head is not None:
        head = agree_on_task(head, teacher_head)
    order = None
    if has_label_names(student) and head.problem_type != "regression":
        order = class_order(config.id2label, teacher.config.id2label)
    ours = _text_or_image(ours)
    theirs = _text_or_image(theirs) or load_processing_class(teacher, ours, revision)
    vocabulary = None
    if getattr(core_model(student), "main_input_name", "input_ids") == "input_ids":
        known = [p if isinstance(p, PreTrainedTokenizerBase) else None for p in (ours, theirs)]
        vocabulary = shared_vocabulary(config, teacher.config, *known)
        check_length(config, teacher.config, known[0])
    elif isinstance(ours, BaseImageProcessor) and theirs is not None:
        check_image_processors(ours, theirs)
    is_language_model = head.kind in ("masked_lm", "causal_lm")
    return head, Alignment(order, vocabulary if is_language_model else None)


def _text_or_image(processor: Any) -> Any:
    """The part of a multi-part processor that can be compared."""
    for part in ("tokenizer", "image_processor"):
        if not isinstance(processor, PreTrainedTokenizerBase) and hasattr(processor, part):
            return getattr(processor, part)
    return processor


def sample_inputs(trainer: Trainer) -> dict[str, Any] | None:
    """A batch of the first rows of the training (or evaluation) data, on the student's device; `None` if there are
    none.

    Nothing is used up: random states are restored, and streams that cannot be read twice are left alone.
    """
    rows = min(2, trainer.args.per_device_train_batch_size)
    dataset: Any = trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    with preserved_random_state():
        collator = trainer.data_collator
        if isinstance(dataset, datasets.Dataset | datasets.IterableDataset) and dataset.column_names is not None:
            dataset = trainer._remove_unused_columns(dataset)
        else:
            collator = trainer._get_collator_with_removed_columns(collator)
        if isinstance(dataset, datasets.IterableDataset):
            features = list(dataset.take(rows))
        elif isinstance(dataset, Dataset | datasets.Dataset | list) and hasattr(dataset, "__len__"):
            features = [dataset[i] for i in range(min(rows, len(dataset)))]
        else:
            features = []
        if not features:
            return None
        inputs = collator(features)
    student: Any = trainer.model
    device = next(student.parameters()).device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


@contextlib.contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Leave every random state as it was found; inside, start from `seed` if one is given."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def dry_run(trainer: DistillationTrainer, student: nn.Module) -> None:
    """One forward of both models on the first rows: build what the losses own, and fail now rather than at the first
    step.
    """
    losses, inputs, trains = trainer.losses, sample_inputs(trainer), trainer.train_dataset is not None
    if losses.student_needs.attentions:
        use_eager_attention(student)
    if losses.teacher_needs.attentions and isinstance(trainer.teacher, OnlineTeacher):
        use_eager_attention(trainer.teacher.model)
    if inputs is None and losses.student_needs.hidden_states:
        inputs = dict(getattr(student, "dummy_inputs", None) or {})
        trains = False
    with preserved_random_state(trainer.args.seed), torch.no_grad():
        if not inputs:
            losses.setup(Shapes(), Shapes())
            losses.to(trainer.args.device)
            return
        batch = Batch.from_inputs(inputs, trainer.head)
        _refuse_other_labels(student, trainer.head, batch)
        if trains:
            _refuse_missing_labels(losses, batch, trainer.label_names)
        # All hidden states: which ones the losses read is known only once they have seen how many there are.
        needs, was_training = (losses.student_needs | Needs(logits=True)).of_every_layer(), student.training
        outputs = student.eval()(**trainer._inputs_for("student", inputs), **needs.forward_arguments())
        student.train(was_training)
        answer = Activations.from_outputs(outputs, trainer.head, needs).at_positions(trainer.head, inputs)
        teacher = trainer._ask_teacher(inputs, losses.teacher_needs.of_every_layer(), required=trains)
        if teacher is not None:
            _refuse_other_classes(answer, teacher, trainer.head)
            losses.setup(answer.shapes(), teacher.shapes())
        losses.to(trainer.args.device)
        if next(student.parameters()).device == trainer.args.device:
            losses(answer, teacher, batch)


def _refuse_missing_labels(losses: LossTerms, batch: Batch, label_names: list[str]) -> None:
    hard = hard_label_names(losses)
    if hard and batch.labels is None:
        raise ValueError(
            f"The loss {hard[0]!r} learns from labels, but the training data has no column "
            f"{' or '.join(label_names)}. Add it, or set hard_label_weight=0 to learn from the teacher alone."
        )


def _refuse_other_labels(student: nn.Module, head: Head, batch: Batch) -> None:
    """The labels say what the student is for; a teacher that says something else would decide it where they do not."""
    own = head_of(student).problem(batch.labels)
    if batch.labels is not None and own != batch.problem:
        raise ValueError(
            f"The labels make the student a {own} model, but the teacher is for {batch.problem} "
            f"(num_labels={head.num_labels}). Use a teacher of this task, or set the student's config.problem_type."
        )


def _refuse_other_classes(student: Activations, teacher: Activations, head: Head) -> None:
    if teacher.logits is None or student.logits is None or head.kind in ("masked_lm", "causal_lm"):
        return
    if student.logits.shape != teacher.logits.shape:
        raise ValueError(
            f"The student's answers have shape {tuple(student.logits.shape)}, the teacher's "
            f"{tuple(teacher.logits.shape)} for the same rows. Both need the same classes and positions; a column "
            f"{TEACHER_LOGITS!r} must come from this dataset, in the student's class order."
        )
