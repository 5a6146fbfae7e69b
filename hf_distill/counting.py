"""What is counted and logged around a step: windows of batches, the terms' means, the rows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import nested_detach

from hf_distill.batch import Batch
from hf_distill.heads import core_model
from hf_distill.lifecycle import TrainerOfLosses
from hf_distill.schedules import Moment
from hf_distill.term_log import TermLog


class TrainerOfTerms(TrainerOfLosses):
    """A Trainer that divides its terms by what the whole window counts, and logs them one by one.

    Attributes:
        student_completions: Makes the student's own completions of some batches; `None` where none are asked for.
    """

    student_completions: Any

    def start_counting(self) -> None:
        """Nothing is counted yet."""
        self._train_terms, self._eval_terms = TermLog(), TermLog()
        self._windows_to_log = 0
        self._window_counts: Tensor | None = None
        self._loss_only = False
        self._taught = False

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._train_terms, self._windows_to_log = TermLog(), 0  # of a run before, what it did not log
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._window_counts = None  # what is computed afterwards is no part of a window

    # ---- Counting and logging ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        if self.student_completions is not None:  # before anything is counted
            student = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
            step = self.state.global_step
            epoch_iterator = self.student_completions.of_window(epoch_iterator, student, step)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([Batch.from_inputs(batch, self.head).counts() for batch in batches]).sum(0).to(device)
            if self.args.average_tokens_across_devices:
                counts = self.accelerator.reduce(counts, reduction="sum")
            self._window_counts = counts
            self.losses.at(Moment.of(self.state.global_step, self.state.max_steps, self.state.epoch or 0.0))
            self._windows_to_log += 1
            num_items = counts[0] if num_items is None else num_items
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own, which must have come by the losses.

        Raises:
            ValueError: If a subclass computes another loss, without the teacher.
        """
        self._taught = False
        loss = super().training_step(*args, **kwargs)
        if not self._taught:
            raise ValueError(
                f"{type(self).__name__}.compute_loss does not call DistillationTrainer's, so the teacher would teach "
                "nothing. Call super().compute_loss(...) and add to it, or pass your loss as compute_loss_func= (in "
                "place of the hard-label term), or as a DistillationLoss among losses=."
            )
        return loss

    def _remember(self, terms: Mapping[str, Tensor], batch: Batch, training: bool) -> None:
        self._taught |= training
        # A term is this process' share of the whole, or with local counts a mean of its own.
        share = 1.0 if self.args.average_tokens_across_devices else 1.0 / self.accelerator.num_processes
        for name, term in terms.items():
            loss = self.losses[name]
            if training:
                self._train_terms.add(name, term, share)
            elif not loss.fit_rows or bool(loss.fitted):  # else it has learned nothing yet, and says nothing
                self._eval_terms.add(name, term, batch.totals[loss.over])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line of the training log, as opposed to evaluation and the final summary
            terms = self._train_terms.drain(self._sum_over_processes, self._windows_to_log)
            self._windows_to_log = 0
            logs.update({f"{name}_loss": value for name, value in terms.items()})
        super().log(logs, start_time)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # ---- Evaluation ----

    def _real_rows(self, rows: int) -> int:
        """How many rows of this process' batch are not copies that fill up the last batch of several processes."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return max(0, min(rows, state.remainder - self.accelerator.process_index * rows))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        self._loss_only = prediction_loss_only
        try:
            if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            with torch.no_grad():  # Trainer would skip the loss; without labels ours is the distance to the teacher
                loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        finally:
            self._loss_only = False
        if prediction_loss_only:
            return loss, None, None
        config = core_model(self.model).config
        ignored = ignore_keys or getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        logits = nested_detach(tuple(value for key, value in outputs.items() if key not in (*ignored, "loss")))
        return loss, logits[0] if len(logits) == 1 else logits, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_terms = TermLog()
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        output: Any = super().evaluation_loop(*args, **kwargs)
        terms = self._eval_terms.drain(self._sum_over_processes)
        output.metrics.update({f"{prefix}_{name}_loss": value for name, value in terms.items()})
        if terms:
            output.metrics[f"{prefix}_distillation_loss"] = sum(self.losses[n].weight * v for n, v in terms.items())
        return output
