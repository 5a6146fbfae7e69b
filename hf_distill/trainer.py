"""The trainer: a teacher and a student see the same batch, the losses compare what they return, `Trainer` does the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_distill.activations import Activations, Batch, Needs, Shapes
from hf_distill.heads import core_model, forward_parameters
from hf_distill.losses import DistillationLoss, HardLabelLoss, LossTerms
from hf_distill.preflight import (
    align,
    preserved_random_state,
    refuse_unsupported,
    refuse_unsupported_model,
    sample_inputs,
)
from hf_distill.reports.model_card import add_distillation_section
from hf_distill.teachers import TEACHER_LOGITS, Teacher, TeacherLogitsCollator
from hf_distill.teachers.loading import load_teacher
from hf_distill.term_log import TermLog
from hf_distill.training_args import DistillationTrainingArguments, build_losses, changed_loss_fields
from hf_distill.wrapped_forward import attach_losses, detach_losses, forward_through

LOSSES_NAME = "distillation_losses.safetensors"


class DistillationTrainer(Trainer):
    """`Trainer` that also learns from a teacher.

    From an existing `Trainer` script the change is two lines: the class, and `teacher_model=`. The minimised loss is the weighted
    sum of the terms, each a mean over what it counts (labels, tokens, rows) in the whole accumulation window and on all
    processes. `eval_loss` stays the task's loss on labels, comparable with a plain fine-tune; each term is logged as
    `<name>_loss` and `eval_<name>_loss`, their weighted sum in evaluation as `eval_distillation_loss`.

    A dataset column `teacher_logits` is used instead of running the teacher; with it `teacher_model` may be left out (the
    classes are then taken to be in the student's order).

    Args:
        model: The student.
        args: [`DistillationTrainingArguments`], or plain `TrainingArguments` for the default losses.
        compute_loss_func: Replaces the hard-label term.
        teacher_model: A model, a path or Hub name (loaded with the student's task class), or a [`Teacher`].
        losses: Name -> [`DistillationLoss`]; replaces all default terms, the one on hard labels too.
        teacher_processing_class: The teacher's tokenizer or image processor; loaded from beside its weights if left out.

    All other arguments are Trainer's own, in Trainer's order.

    Raises:
        ValueError: If the models cannot be compared, a setting is not supported, or nothing is left to learn.
    """

    # The losses divide by the counts of the whole window; Trainer must not divide again.
    loss_is_scaled_for_ga = True

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
        teacher_model: nn.Module | Teacher | str | os.PathLike[str] | None = None,
        losses: Mapping[str, DistillationLoss] | None = None,
        teacher_processing_class: Any = None,
    ) -> None:
        if isinstance(model, str):
            raise ValueError(f"model must be the student itself, got the string {model!r}. Load it with AutoModelFor....")
        args = args if args is not None else DistillationTrainingArguments("tmp_trainer")
        refuse_unsupported(args)
        self.losses = _losses(args, losses, compute_loss_func)
        if not self.losses.student_needs.logits and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # the head stays unused, also where checkpointing turns the search off
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        refuse_unsupported_model(self)
        self.teacher = load_teacher(teacher_model, args, self.model, args.device)
        revision = getattr(args, "teacher_model_revision", None)
        self.head, self.alignment = align(
            self.model, self.teacher, processing_class, teacher_processing_class, revision
        )
        if compute_loss_func is not None and self.head.kind == "span":
            raise ValueError("compute_loss_func is called with `labels`, which question answering has not. Pass losses= instead.")
        side = getattr(processing_class, "padding_side", "right")
        self.data_collator = TeacherLogitsCollator(self.data_collator, self.head, side)
        self._train_terms, self._eval_terms = TermLog(), TermLog()
        self._logged_step = 0
        self._window_counts: Tensor | None = None
        self._set_up_losses(self.model)

    # ---- The main path ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Student forward, teacher forward, weighted sum of the losses, one scale."""
        training = model.training
        losses = self.losses
        teacher = self._ask_teacher(inputs, losses.teacher_needs, required=training)
        batch = Batch.from_inputs(inputs, self.head)
        self._settle_problem_type(batch)
        if training and self._window_counts is not None:
            batch = batch.with_counts(self._window_counts)
        outputs, terms, task_loss = self._student_step(model, inputs, teacher, batch, num_items_in_batch)
        loss = losses.total(terms) if terms else None
        if training:
            # DistributedDataParallel averages over processes what was already divided by the count of all of them.
            loss = loss * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)  # type: ignore[operator]
            self._remember(terms, batch, training=True)
            return (loss, outputs) if return_outputs else loss
        if loss is not None:
            self._remember(terms, batch, training=False)
        loss = task_loss if task_loss is not None else loss
        return (loss, outputs) if return_outputs else loss

    def _student_step(
        self, model: nn.Module, inputs: Mapping[str, Any], teacher: Activations | None, batch: Batch, num_items: Any
    ) -> tuple[Any, dict[str, Tensor], Tensor | None]:
        """The student's outputs, the terms, and (in evaluation) the task's own loss if there are labels."""
        training, labelled = model.training, batch.labels is not None
        needs = self.losses.student_needs
        needs = needs if training else needs | Needs(logits=labelled)
        labels = inputs.get("labels")

        def step(student: nn.Module, **student_inputs: Any) -> tuple[Any, dict[str, Tensor], Tensor | None]:
            outputs = student(**student_inputs, **needs.forward_arguments())
            answer = Activations.from_outputs(outputs, inputs, self.head, needs)
            replaced = {}
            task_loss = None
            if self.compute_loss_func is not None and labelled:
                task_loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items)
                replaced = {name: task_loss for name, loss in self.losses.items() if isinstance(loss, HardLabelLoss)}
            elif not training and labelled:
                smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
                task_loss = HardLabelLoss(label_smoothing=smoothing)(answer, Activations(), batch)
            terms = self.losses(answer, teacher, batch, replaced=replaced)
            if needs.hidden_states:
                outputs = type(outputs)(**{key: value for key, value in outputs.items() if key != "hidden_states"})
            return outputs, terms, task_loss

        student_inputs = self._student_inputs(inputs)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if student is model or not any(True for _ in self.losses.parameters()):
            return step(model, **student_inputs)
        return forward_through(model, student, step, student_inputs)

    def _ask_teacher(self, inputs: Mapping[str, Any], needs: Needs, required: bool) -> Activations | None:
        """The teacher's answer in the student's class order, stored or fresh; `None` if it is not needed or not to be had."""
        if not needs:
            return Activations()
        if not required and not getattr(self.args, "eval_with_teacher", True):
            return None
        stored = None
        if needs.logits and inputs.get(TEACHER_LOGITS) is not None:
            stored = self.head.logits({"logits": inputs[TEACHER_LOGITS]}, inputs)
            needs = replace(needs, logits=False)
        answer = Activations()
        if needs:
            if self.teacher is None:
                if not required:
                    return None
                raise ValueError(
                    f"The losses need the teacher's {needs}, but there is no teacher_model"
                    + (f" and no column {TEACHER_LOGITS!r} in the batch. Pass one of them." if needs.logits else ". Pass one.")
                )
            answer = self.teacher(self._teacher_inputs(inputs), needs)
        return self.alignment(answer if stored is None else replace(answer, logits=stored))

    # ---- What each model sees ----

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own: Any = self._signature_columns
            extra = {TEACHER_LOGITS, *(self.teacher.input_names if self.teacher is not None else ())}
            self._signature_columns = [*own, *sorted(extra - set(own))]

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Everything but labels, stored answers, and columns that only the teacher names."""
        names, _ = forward_parameters(self.model)
        only_teacher = (self.teacher.input_names if self.teacher is not None else set()) - names
        return {key: value for key, value in self._without_labels(inputs) if key not in only_teacher}

    def _teacher_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same for the teacher."""
        names, _ = forward_parameters(self.model)
        only_student = names - self.teacher.input_names  # type: ignore[union-attr]
        shared = {key: value for key, value in self._without_labels(inputs) if key not in only_student}
        return shared | ({"shift_labels": inputs["shift_labels"]} if "shift_labels" in inputs else {})

    def _without_labels(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        hidden = {*self.label_names, "labels", "label", "label_ids", "shift_labels", "num_items_in_batch", TEACHER_LOGITS}
        return ((key, value) for key, value in inputs.items() if key not in hidden)

    # ---- Setting up ----

    def _set_up_losses(self, student: nn.Module) -> None:
        """One dry forward of both models: build what the losses own, and fail now rather than at the first step."""
        inputs = sample_inputs(self)
        if inputs is None and self.losses.student_needs.hidden_states:
            inputs = dict(getattr(student, "dummy_inputs", None) or {})
        was_training, needs = student.training, self.losses.student_needs | Needs(logits=True)
        with preserved_random_state(self.args.seed), torch.no_grad():
            if not inputs:
                self.losses.setup(Shapes(), Shapes())
                return
            outputs = student.eval()(**self._student_inputs(inputs), **needs.forward_arguments())
            answer = Activations.from_outputs(outputs, inputs, self.head, needs)
            teacher = self._ask_teacher(inputs, self.losses.teacher_needs, required=True)
            self._refuse_other_classes(answer, teacher)
            self.losses.setup(answer.shapes(), (teacher or Activations()).shapes())
            self.losses.to(self.args.device)
            if next(student.parameters()).device == self.args.device:
                self.losses(answer, teacher, Batch.from_inputs(inputs, self.head))
        student.train(was_training)

    def _refuse_other_classes(self, student: Activations, teacher: Activations | None) -> None:
        if teacher is None or teacher.logits is None or self.head.kind in ("masked_lm", "causal_lm"):
            return
        if student.logits is not None and student.logits.shape != teacher.logits.shape:
            raise ValueError(
                f"The student's answers have shape {tuple(student.logits.shape)}, the teacher's {tuple(teacher.logits.shape)} for the same rows. "
                f"Both need the same classes and positions; a column {TEACHER_LOGITS!r} must come from this dataset, in the student's class order."
            )

    def _settle_problem_type(self, batch: Batch) -> None:
        """Write the problem type that labels decide into the config, as Transformers' own heads do."""
        if self.head.kind == "rows" and self.head.problem_type is None and batch.labels is not None:
            self.head = replace(self.head, problem_type=batch.problem)  # type: ignore[arg-type]
            config = core_model(self.model).config
            config.problem_type = config.problem_type or batch.problem

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        if getattr(self, "is_in_train", False):  # train() replaces the model: its losses start afresh too
            detach_losses(self.model)
            self._set_up_losses(model.to(self.args.device))
            attach_losses(model, self.losses)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; prints the equation that is minimised."""
        if self.is_world_process_zero():
            print(f"Minimising {self.losses.equation()}")
        self._logged_step = 0
        attach_losses(self.model, self.losses)
        try:
            return super().train(*args, **kwargs)
        finally:
            detach_losses(self.model)

    # ---- Counting and logging ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([Batch.from_inputs(batch, self.head).counts() for batch in batches]).sum(0).to(device)
            if self.args.average_tokens_across_devices:
                counts = self.accelerator.reduce(counts, reduction="sum")
            self._window_counts = counts
        return batches, num_items

    def _remember(self, terms: Mapping[str, Tensor], batch: Batch, training: bool) -> None:
        for name, term in terms.items():
            if training:
                self._train_terms.add(name, term, 1.0 if self.args.average_tokens_across_devices else 1 / self.accelerator.num_processes)
            else:
                self._eval_terms.add(name, term, batch.totals[self.losses[name].over])  # type: ignore[index]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line of the training log, as opposed to evaluation and the final summary
            steps = self.state.global_step - self._logged_step
            self._logged_step = self.state.global_step
            terms = self._train_terms.drain(self._sum_over_processes, steps)
            logs.update({f"{name}_loss": value for name, value in terms.items()})
        super().log(logs, start_time)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # ---- Evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():  # Trainer would skip the loss; without labels ours is the distance to the teacher
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        ignored = ignore_keys or getattr(core_model(self.model).config, "keys_to_ignore_at_inference", ["past_key_values"])
        logits = nested_detach(tuple(value for key, value in outputs.items() if key not in (*ignored, "loss")))
        return loss, logits[0] if len(logits) == 1 else logits, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_terms = TermLog()
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        output = super().evaluation_loop(*args, **kwargs)
        terms = self._eval_terms.drain(self._sum_over_processes)
        output.metrics.update({f"{prefix}_{name}_loss": value for name, value in terms.items()})
        if terms:
            output.metrics[f"{prefix}_distillation_loss"] = sum(self.losses[n].weight * v for n, v in terms.items())
        return output

    # ---- Checkpoints and cards ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = self.losses.state_dict()
        if state and self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            save_file({key: value.contiguous() for key, value in state.items()}, os.path.join(folder, LOSSES_NAME))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_losses(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_losses(self.state.best_model_checkpoint)

    def _load_losses(self, folder: str | None) -> None:
        if folder is None or not self.losses.state_dict():
            return
        path = os.path.join(folder, LOSSES_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {folder} has no {LOSSES_NAME}, but the losses have learned parameters to restore. Resume with the losses that "
                "the checkpoint was made with, or start a new run."
            )
        self.losses.load_state_dict(load_file(path))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's card, with the teacher and the equation that was minimised."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            teacher = self.teacher.name if self.teacher is not None else None
            add_distillation_section(os.path.join(self.args.output_dir, "README.md"), teacher, self.losses)


def _losses(
    args: TrainingArguments, losses: Mapping[str, DistillationLoss] | None, compute_loss_func: Callable[..., Any] | None
) -> LossTerms:
    """The terms that the arguments stand for, or the user's own."""
    if losses is not None and (changed := changed_loss_fields(args)):
        raise ValueError(
            f"`losses` replaces the default losses, so {changed} would have no effect. Set them on the losses you pass, or leave out `losses`."
        )
    terms = LossTerms(build_losses(args) if losses is None else losses)
    has_hard = any(isinstance(loss, HardLabelLoss) and loss.weight > 0 for loss in terms.values())
    if compute_loss_func is not None and not has_hard:
        raise ValueError(
            "compute_loss_func replaces the hard-label term, but there is none. Set hard_label_weight above 0, put a HardLabelLoss into `losses`, or "
            "leave out compute_loss_func."
        )
    return terms
