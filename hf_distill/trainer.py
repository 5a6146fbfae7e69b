"""The trainer: teacher and student see the same batch, losses compare what they return, `Trainer` does the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_distill.activations import Activations, Needs
from hf_distill.batch import Batch
from hf_distill.caching import collator_after_filling, known_of_teacher, make_keeper
from hf_distill.counting import TrainerOfTerms
from hf_distill.fitting import fit_losses
from hf_distill.heads import core_model, forward_parameters, has_label_names, label_columns
from hf_distill.losses import DistillationLoss, HardLabelLoss, evaluate_losses, hard_label_names
from hf_distill.output_head import OutputHeads, ask_without_head, unprojected, with_whole_logits, without_head
from hf_distill.packing import run_on_real_tokens
from hf_distill.padding import labels_on_padding
from hf_distill.pairing import align, align_answers
from hf_distill.preflight import dry_run, refuse_missing_labels, student_completions
from hf_distill.recording import recording
from hf_distill.refusals import (
    choose_losses,
    refuse_compiled_projections,
    refuse_layers,
    refuse_unsupported,
    refuse_unsupported_model,
    refuse_without_meaning,
)
from hf_distill.teachers import (
    TEACHER_LOGITS,
    EMATeacher,
    EnsembleTeacher,
    Teacher,
    TeacherAnswersCollator,
    is_no_input,
)
from hf_distill.teachers.cached import column_names, is_stored, stored_answers, teacher_view
from hf_distill.teachers.ema import UpdateTeacher, start_following
from hf_distill.teachers.loading import load_teacher
from hf_distill.teachers.rows import columns_of
from hf_distill.token_alignment import on_student_tokens
from hf_distill.training_args import DistillationTrainingArguments
from hf_distill.transfer import TwoTokenizers
from hf_distill.wrapped_forward import attach_losses, detach_losses, forward_through


class DistillationTrainer(TrainerOfTerms):
    """`Trainer` that also learns from a teacher.

    From an existing `Trainer` script the change is two lines: the class, and `teacher_model=`. The minimised loss is
    the weighted sum of the terms, each a mean over what it counts (labels, tokens, rows) in the whole accumulation
    window and on all processes. `eval_loss` stays the task's loss on labels, comparable with a plain fine-tune (of
    question answering without padding among the possible answers; of GPT-2 divided by the labels that are predicted,
    where Trainer divides by all; a term that a model's own forward adds is no part of it); each term is logged as
    `<name>_loss` and `eval_<name>_loss`, their weighted sum as `eval_distillation_loss`.

    A dataset column `teacher_logits` is used instead of running the teacher; with it `teacher_model` may be left out
    (the classes are then taken to be in the student's order). A teacher may be left out of evaluation altogether, with
    `eval_with_teacher=False`, or where evaluation data has no such column: then only the terms on labels are computed.

    Args:
        model: The student.
        args: [`DistillationTrainingArguments`], or plain `TrainingArguments` for the default losses.
        compute_loss_func: Replaces the hard-label term.
        teacher_model: A model, a path or Hub name (loaded with the student's task class), a list
            of these, or a [`Teacher`].
        losses: Name -> [`DistillationLoss`]; replaces all default terms, the one on hard labels too.
        teacher_processing_class: The teacher's tokenizer or image processor; loaded from beside its weights if
            left out.

    All other arguments are Trainer's own, in Trainer's order.

    Raises:
        ValueError: If the models cannot be compared, a setting is not supported, or nothing is left to learn.
    """

    # The losses divide by the counts of the whole window; Trainer must not divide again. Releases that do not know the
    # attribute look at `model_accepts_loss_kwargs` and at whether items were counted.
    loss_is_scaled_for_ga = True

    model: Any
    args: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher_model: nn.Module | Teacher | str | os.PathLike[str] | Sequence[Any] | None = None,
        losses: Mapping[str, DistillationLoss] | None = None,
        teacher_processing_class: Any = None,
    ) -> None:
        if isinstance(model, str):
            raise ValueError(
                f"model must be the student itself, got the string {model!r}. Load it with AutoModelFor...."
            )
        args = args if args is not None else DistillationTrainingArguments("tmp_trainer")
        refuse_unsupported(args)
        self._own_losses = losses
        self.losses = choose_losses(args, losses, compute_loss_func)
        if not self.losses.student_needs.logits and args.ddp_find_unused_parameters is None:
            # The head stays unused, also where activation checkpointing would turn the search off.
            args.ddp_find_unused_parameters = True
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True
        if not self.label_names and args.label_names is None:
            self.label_names = ["labels"]  # of a student whose forward takes none: the losses read them
        refuse_unsupported_model(self)
        refuse_layers(self.losses, self.model, args)
        self.teacher = load_teacher(teacher_model, args, self.model, args.device)
        revision = getattr(args, "teacher_model_revision", None)
        if isinstance(self.teacher, EMATeacher):
            self.add_callback(UpdateTeacher(self.teacher))
        processing = (processing_class, teacher_processing_class)
        if isinstance(self.data_collator, TwoTokenizers):
            self.head, self.alignment = align_answers(self.model, self.teacher, self.losses, self.data_collator.aligns)
        else:
            self.head, self.alignment = align(self.model, self.teacher, *processing, revision)
        refuse_without_meaning(self.head, compute_loss_func)
        side = getattr(processing_class, "padding_side", "right")
        self.data_collator = TeacherAnswersCollator(self.data_collator, self.head, side)
        self.cache_keeper = make_keeper(self)
        self.start_counting()
        self.padding_free = False
        self.stack: str | None = None
        self.removable_heads = self.heads_off = OutputHeads()
        dry_run(self, self.model)
        refuse_compiled_projections(self)
        self.student_completions = student_completions(self)

    # ---- The main path ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Teacher forward, student forward, weighted sum of the losses, one scale.

        In evaluation the loss is the task's own where there are labels, else the distance to the teacher, else `None`.
        """
        training = model.training
        logits_unread = self._loss_only or (training and not return_outputs)
        self.heads_off = self.removable_heads if logits_unread else OutputHeads()
        batch = self._batch(inputs, training)
        teacher = self._ask_teacher(inputs, self.losses.teacher_needs, required=training)
        outputs, terms, loss = self._student_step(model, inputs, teacher, batch, num_items_in_batch)
        self._remember(terms, batch, training)
        if training or (loss is None and terms):
            loss = self.losses.total(terms)
        if training and self.args.average_tokens_across_devices:
            # DistributedDataParallel will average over processes what was divided by the count of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _student_step(
        self, model: nn.Module, inputs: Mapping[str, Any], teacher: Activations | None, batch: Batch, num_items: Any
    ) -> tuple[Any, dict[str, Tensor], Any]:
        """The student's outputs, the terms, and (if known) the task's own loss."""
        labelled, needs, head_off = batch.labels is not None, self.losses.student_needs, self.heads_off.student
        if not model.training:
            needs = needs | Needs(logits=labelled)

        def step(student: nn.Module, **student_inputs: Any) -> tuple[Any, dict[str, Tensor], Any]:
            with without_head(student, head_off), recording(student, needs.qkv) as qkv:
                arguments, packs = needs.forward_arguments(), self.padding_free and model.training
                if packs and not labels_on_padding(batch, inputs, self.head):
                    outputs = run_on_real_tokens(student, student_inputs, arguments, self.head, self.stack)
                else:
                    outputs = student(**student_inputs, **arguments)
            answer = unprojected(Activations.from_outputs(outputs, self.head, needs, qkv), head_off)
            answer = answer.at_positions(self.head, inputs)
            task_loss, replaced = None, {}
            if self.compute_loss_func is not None and labelled:
                task_loss = self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=num_items)
                if not model.training and num_items is not None and self.args.average_tokens_across_devices:
                    task_loss = task_loss * self.accelerator.num_processes  # the items are those of all processes
                replaced = dict.fromkeys(hard_label_names(self.losses), task_loss)
            elif labelled and not model.training:
                smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
                task = {"task": HardLabelLoss(label_smoothing=smoothing)}
                task_loss = evaluate_losses(task, answer, Activations(), batch)["task"]
            terms = self.losses(answer, teacher, batch, replaced=replaced)
            if not labelled and not model.training:
                terms = {name: term for name, term in terms.items() if name not in self.losses.needing_labels()}
            if asked := needs.output_names() | ({"logits"} if head_off else set()):  # evaluation would gather them
                outputs = type(outputs)(**{key: value for key, value in outputs.items() if key not in asked})
            return outputs, terms, task_loss

        student_inputs = self._inputs_for("student", inputs)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        inside = model.training and (self.padding_free or head_off is not None)
        if self.accelerator.num_processes == 1 or student is model:
            return step(model, **student_inputs)
        if not inside and not list(self.losses.parameters()):
            return step(model, **student_inputs)
        return forward_through(model, student, step, student_inputs)

    def _ask_teacher(self, inputs: Mapping[str, Any], needs: Needs, required: bool) -> Activations | None:
        """The teacher's answer in the student's class order, stored or fresh; `None` where it may be left out."""
        if not needs:
            return Activations()
        if not required and not getattr(self.args, "eval_with_teacher", True):
            return None
        answer, missing = stored_answers(inputs, needs, *known_of_teacher(self))
        if missing and self.teacher is None:
            if not required:
                return None
            columns = f" and no column {' or '.join(map(repr, column_names(missing)))} in the batch"
            what = " and ".join(missing.kinds())
            raise ValueError(f"The losses need the teacher's {what}, but there is no teacher_model{columns}.")
        if missing:
            asked = self._inputs_for("teacher", inputs)
            answer = answer | ask_without_head(self.teacher, asked, missing, self.heads_off.teacher)
        answer = on_student_tokens(self.alignment(answer), inputs).at_positions(self.head, inputs)
        return answer if self.heads_off.student is not None else with_whole_logits(answer)

    def _batch(self, inputs: Mapping[str, Any], training: bool) -> Batch:
        """Labels and masks, with the window's counts in training and without other processes' copies in evaluation."""
        batch = Batch.from_inputs(inputs, self.head)
        if self.head.kind == "rows" and batch.labels is not None:
            self.settle(batch)
            config = core_model(self.model).config
            if getattr(config, "problem_type", None) is None and has_label_names(self.model):
                # As Transformers' own heads do, for whoever loads the student: `pipeline` looks here for its scores.
                config.problem_type = batch.problem
        if not training:
            return batch.first_rows(self._real_rows(batch.rows))
        refuse_missing_labels(self.losses, batch, self.head)  # of a stream the first rows are seen here
        return batch if self._window_counts is None else batch.with_counts(self._window_counts)

    def settle(self, batch: Batch) -> None:
        """Take the kind of problem from the labels, where no config says it: for the losses and for an ensemble."""
        if self.head.kind != "rows" or self.head.problem_type is not None or batch.labels is None:
            return
        self.losses.refuse_undefined(self.head, batch.problem)
        self.head = replace(self.head, problem_type=batch.problem)
        if isinstance(self.teacher, EnsembleTeacher):
            self.teacher.settle(batch.problem)
            self.cache_keeper = make_keeper(self)  # another ensemble by its fingerprint

    # ---- What each model sees ----

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own: Any = self._signature_columns
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            columns = {column for each in (self.train_dataset, *several.values()) for column in columns_of(each)}
            stored = {TEACHER_LOGITS, *filter(is_stored, columns)}
            extra = stored | (self.teacher.input_names if self.teacher is not None else set())
            extra |= set(getattr(self.data_collator, "text_columns", ()))
            self._signature_columns = [*own, *sorted(extra - set(own))]

    def _inputs_for(self, who: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Everything but labels, stored answers, and columns that only the other model names."""
        inputs = teacher_view(inputs) if who == "teacher" else inputs
        student, _ = forward_parameters(self.model)
        teacher = self.teacher.input_names if self.teacher is not None else set()
        foreign = teacher - student if who == "student" else student - teacher
        hidden = foreign | label_columns(self.label_names, student | teacher)
        return {key: value for key, value in inputs.items() if key not in hidden and not is_no_input(key)}

    # ---- The teacher cache ----

    def open_cache(self) -> None:
        """Look answers up in the cache that keeps what the losses need."""
        if self.cache_keeper is not None:
            over = self.losses.teacher_logits_over()
            self.data_collator.cache = self.cache_keeper.cache(self.losses.teacher_needs, over)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        own = self.data_collator
        self.data_collator = collator_after_filling(self, dataset, training=description == "Training")
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = own

    # ---- Setting up ----

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        if getattr(self, "is_in_train", False):  # train() replaces the model: its losses start afresh too
            detach_losses(self.model)
            self.model = model.to(self.args.device)
            start_following(self.teacher, model, self.args.device)
            dry_run(self, model)
            attach_losses(model, self.losses)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.hp_search_backend is None or trial is None:
            return
        # The trial has set arguments one by one, unchecked: what they stand for is built and checked anew.
        detach_losses(self.model)
        self.losses = choose_losses(self.args, self._own_losses, self.compute_loss_func)
        dry_run(self, self.model)
        attach_losses(self.model, self.losses)

    def fit_losses(self) -> None:
        """Show training rows to the losses that learn from them before the first step and have not."""
        fit_losses(self)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.fit_losses()  # here a new student has been made, and a checkpoint loaded
        return super()._inner_training_loop(*args, **kwargs)
