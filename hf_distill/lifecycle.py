"""What the losses and the teacher live through beside the student: optimised, saved, restored, told of in its card."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, default_compute_objective

from hf_distill.activations import Head
from hf_distill.losses import LossTerms
from hf_distill.reports.model_card import write_model_card
from hf_distill.secrets import saved_without_tokens
from hf_distill.teachers import Teacher
from hf_distill.teachers.ema import restore_teacher, save_teacher
from hf_distill.wrapped_forward import attach_losses, detach_losses, load_losses, save_losses


class TrainerOfLosses(Trainer):
    """`Trainer` whose losses may learn too, and whose teacher may change.

    Attributes:
        losses: The terms.
        head: What the student's answers mean.
        teacher: Who is asked; `None` where stored answers are read alone.
    """

    losses: LossTerms
    teacher: Teacher | None
    head: Head
    model: Any
    args: Any

    # ---- Training and searching ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; prints the equation that is minimised."""
        if self.is_world_process_zero():
            print(f"Minimising {self.losses.equation(self.head.problem(None))}")
        attach_losses(self.model, self.losses)
        try:
            return super().train(*args, **kwargs)
        finally:
            detach_losses(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in known for parameter in self.losses.parameters()):
            raise ValueError(
                "The optimizer that was passed does not know the losses' own parameters (projections), which would "
                "never learn. Leave out `optimizers`, or add them: "
                "trainer.optimizer.add_param_group({'params': list(trainer.losses.parameters())})."
            )
        return optimizer

    def hyperparameter_search(
        self,
        hp_space: Callable[..., Any] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.hyperparameter_search`; by default the terms of the distillation are no part of what is sought:
        they change with the very weights and temperatures that are tried.
        """

        def without_terms(metrics: dict[str, float]) -> float:
            ours = tuple(f"_{name}_loss" for name in (*self.losses, "distillation"))
            return default_compute_objective({name: v for name, v in metrics.items() if not name.endswith(ours)})

        return super().hyperparameter_search(hp_space, compute_objective or without_terms, *args, **kwargs)

    # ---- Checkpoints and cards ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # first, so that a checkpoint that looks complete has them
            folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            save_losses(self.losses, folder)
            save_teacher(self.teacher, folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_losses(self.losses, resume_from_checkpoint)
        restore_teacher(self.teacher, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best: Any = self.state.best_model_checkpoint
        if not os.path.isdir(best):  # gone: Trainer has said so, and keeps the last
            return
        load_losses(self.losses, best)
        restore_teacher(self.teacher, best)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with saved_without_tokens(self):
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with saved_without_tokens(self):
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        description: str | None = None,
        results: str | None = None,
        metrics: Mapping[str, float] | None = None,
        limits: str | None = None,
    ) -> None:
        """Write the student's card, with teacher, data, equation and settings, to `output_dir`.

        Args:
            license: Licence of the student; that of the teacher if left out and known.
            finetuned_from: A base model beside the teacher and the checkpoint that the student started from.
            description: Markdown that stands at the top.
            results: Markdown: a table that compares teacher, student and the same student without a teacher.
            metrics: What the Hub shows as results; by default the last evaluation's.
            limits: Markdown: what the student is not for.

        All other arguments are Trainer's own. `push_to_hub` takes all of them too.
        """
        if self.is_world_process_zero():
            write_model_card(
                self, language=language, license=license, tags=tags, model_name=model_name,
                finetuned_from=finetuned_from, tasks=tasks, dataset_tags=dataset_tags, dataset=dataset,
                dataset_args=dataset_args, description=description, results=results, metrics=metrics, limits=limits,
            )  # fmt: skip
