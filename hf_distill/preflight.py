"""What is looked at before the first step: one dry forward of both models on the first rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from transformers import Trainer

from hf_distill.activations import Activations, Head, Needs, Shapes
from hf_distill.batch import Batch
from hf_distill.heads import core_model, head_of, in_eval_mode, use_eager_attention
from hf_distill.losses import LossTerms
from hf_distill.output_head import OutputHeads, find_output_head, unprojected, without_head
from hf_distill.padding import drop_padding
from hf_distill.random_state import preserved_random_state
from hf_distill.recording import recording
from hf_distill.refusals import refuse_student_generation
from hf_distill.teachers import TEACHER_LOGITS, LocalTeacher, OnlineTeacher
from hf_distill.teachers.cached import brought
from hf_distill.teachers.rows import is_stream
from hf_distill.transfer import StudentCompletions

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer


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
        dataset, collator = as_loaded(trainer, dataset, trainer.data_collator)
        if isinstance(dataset, datasets.IterableDataset):
            features = list(dataset.take(rows))
        elif not is_stream(dataset):
            features = [dataset[i] for i in range(min(rows, len(dataset)))]
        else:
            features = []
        if not features:
            return None
        inputs = collator(features)
    student: Any = trainer.model
    device = next(student.parameters()).device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def as_loaded(trainer: Trainer, dataset: Any, collator: Any) -> tuple[Any, Any]:
    """A dataset and a collator as Trainer's data loader uses them: without the columns that no model reads."""
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset) and dataset.column_names is not None:
        return trainer._remove_unused_columns(dataset), collator
    return dataset, trainer._get_collator_with_removed_columns(collator)


def dry_run(trainer: DistillationTrainer, student: nn.Module) -> None:
    """One forward of both models on the first rows: build what the losses own, and fail now rather than at the first
    step.
    """
    losses, trains = trainer.losses, trainer.train_dataset is not None
    needs = losses.student_needs
    trainer.data_collator.over = losses.teacher_logits_over()
    inputs = sample_inputs(trainer)
    if needs.attentions:
        use_eager_attention(student)
    if losses.teacher_needs.attentions and isinstance(trainer.teacher, LocalTeacher):
        trainer.teacher.use_eager_attention()
    made_up = inputs is None and bool(needs.hidden_states or needs.attentions or needs.qkv)
    if made_up:
        inputs, trains = _made_up_inputs(trainer, student), False
    with preserved_random_state(trainer.args.seed), torch.no_grad():
        if not inputs:
            losses.refuse_undefined(trainer.head, trainer.head.problem(None))
            losses.setup(Shapes(), Shapes())
            losses.to(trainer.args.device)
            return
        batch = Batch.from_inputs(inputs, trainer.head)
        _refuse_other_labels(student, trainer.head, batch)
        trainer.settle(batch)
        if trains:
            refuse_missing_labels(losses, batch, trainer.head)
        # All hidden states: which ones the losses read is known only once they have seen how many there are.
        needs = (needs | Needs(logits=True)).of_every_layer()
        trainer.heads_off = trainer.removable_heads = heads = removable_heads(trainer, student, inputs)
        answer = ask_student(trainer, student, inputs, needs, heads.student)
        losses.refuse_undefined(trainer.head, batch.problem, answer.shapes())
        teacher = _set_up(trainer, answer, inputs, required=trains or (made_up and trainer.teacher is not None))
        losses.to(trainer.args.device)
        if next(student.parameters()).device == trainer.args.device:
            losses(answer, teacher, batch)
        drop_padding(trainer, student, inputs if trains else {})


def _made_up_inputs(trainer: DistillationTrainer, student: Any) -> dict[str, Any]:
    """Texts that stand for rows which cannot be looked at beforehand.

    Raises:
        ValueError: If the student reads no texts.
    """
    if getattr(student, "main_input_name", "input_ids") != "input_ids":
        given = trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset
        raise ValueError(
            f"Losses on layers look at the first rows before training, and {type(given).__name__} gives none "
            "beforehand. Pass a dataset with a length, or a datasets.IterableDataset, which can be read twice."
        )
    made: Mapping[str, Any] = getattr(student, "dummy_inputs", None) or {}
    device = next(student.parameters()).device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in made.items()}


def ask_student(
    trainer: DistillationTrainer, student: nn.Module, inputs: Mapping[str, Any], needs: Needs, head_off: Any = None
) -> Activations:
    """What the student returns for a batch in eval mode, as the losses read it."""
    with in_eval_mode(student), without_head(student, head_off), recording(student, needs.qkv) as qkv:
        outputs = student(**trainer._inputs_for("student", inputs), **needs.forward_arguments())
    answer = unprojected(Activations.from_outputs(outputs, trainer.head, needs, qkv), head_off)
    return answer.at_positions(trainer.head, inputs)


def _set_up(
    trainer: DistillationTrainer, student: Activations, inputs: dict[str, Any], required: bool
) -> Activations | None:
    """Show the losses both models' shapes; the teacher's answers for the batch, `None` where it may be left out."""
    losses, keeper = trainer.losses, trainer.cache_keeper
    every_layer = losses.teacher_needs.of_every_layer()
    known = keeper.shapes(every_layer, inputs) if keeper is not None else None
    if known is not None:  # a full cache needs no teacher, so none is loaded
        losses.setup(student.shapes(), replace(known, logits=student.shapes().logits))
        trainer.open_cache()
        inputs = sample_inputs(trainer) or inputs
        teacher = trainer._ask_teacher(inputs, losses.teacher_needs, required)
    else:
        if trainer.teacher is None and (every_layer.hidden_states or every_layer.attentions):
            every_layer = brought(inputs)  # no teacher says which other layers there are
        teacher = trainer._ask_teacher(inputs, every_layer, required)
    if teacher is None:
        return None
    _refuse_other_classes(student, teacher, trainer.head)
    _refuse_nan(teacher)
    if known is None:
        losses.setup(student.shapes(), teacher.shapes())
        if keeper is not None:
            keeper.remember_shapes(teacher.shapes(), inputs)
            trainer.open_cache()
    return teacher


def _refuse_nan(teacher: Activations) -> None:
    """Trainer would go on, and log a loss of 0."""
    if isinstance(teacher.logits, torch.Tensor) and bool(teacher.logits.isnan().any()):
        raise ValueError(
            "The teacher answers NaN about the first rows: its weights are broken, or too large for its precision. "
            "Load a sound checkpoint, or set teacher_dtype='float32'."
        )


def student_completions(trainer: DistillationTrainer) -> StudentCompletions | None:
    """What lets the student write, if it is asked to (`student_generation_share`)."""
    args: Any = trainer.args
    share = getattr(args, "student_generation_share", 0.0)
    if not share:
        return None
    refuse_student_generation(trainer, sample_inputs(trainer))
    pad = getattr(trainer.processing_class, "pad_token_id", None)
    pad = pad if pad is not None else getattr(core_model(trainer.model).config, "pad_token_id", None)
    kwargs = args.student_generation_kwargs or {}
    return StudentCompletions(share, args.seed, pad or 0, args.process_index, kwargs)


def removable_heads(trainer: DistillationTrainer, student: nn.Module, inputs: dict[str, Any]) -> OutputHeads:
    """The output heads of two language models, where no loss needs all their logits at once."""
    ids = inputs.get("input_ids")
    asks_for_all = trainer.compute_loss_func is not None or not trainer.losses.by_position()
    if trainer.head.kind not in ("masked_lm", "causal_lm") or ids is None or ids.ndim != 2:
        return OutputHeads()
    if asks_for_all or trainer.args.torch_compile:
        return OutputHeads()
    ours, teacher = find_output_head(student, ids), trainer.teacher
    if ours is None or not isinstance(teacher, OnlineTeacher) or trainer.cache_keeper is not None:
        return OutputHeads(ours)
    return OutputHeads(ours, find_output_head(teacher.model, ids))


def refuse_missing_labels(losses: LossTerms, batch: Batch, head: Head) -> None:
    """Refuse training rows without the labels that a loss reads.

    Raises:
        ValueError: Naming the loss.
    """
    names, column = losses.needing_labels(), "start_positions or end_positions" if head.kind == "span" else "labels"
    if names and batch.labels is None:
        raise ValueError(
            f"The loss {names[0]!r} learns from labels, but the training data has no column {column}. Add it, "
            "or drop that loss (hard_label_weight=0) to learn from the teacher alone."
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
