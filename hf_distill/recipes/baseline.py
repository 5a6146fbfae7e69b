"""The same student without a teacher: what tells whether distillation helped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, set_seed

from hf_distill.metrics.scores import micro_f1
from hf_distill.recipes.reading import rate_for
from hf_distill.recipes.stages import begin, finish, is_done, last_whole_checkpoint, show_bars_only
from hf_distill.trainer import DistillationTrainer
from hf_distill.training_args import DistillationTrainingArguments

# Of students of width 160, a tenth of the teacher, that start from its weights. Accuracy of validation rows in % at a
# fourth of this rate, a half of it, and this: Fashion-MNIST 92.1, 92.6, 92.7; films all 79.2 to 79.4. At a fourth and
# this: tags 95.2, 95.7.
LEARNING_RATE = 1e-3
PATIENCE = 3  # epochs without a gain on validation rows


class StopAfterWarmup(EarlyStoppingCallback):
    """Early stopping whose patience begins when the learning rate has risen: a run of many short epochs would end
    before it has learned anything.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, *metrics: Any, **kwargs: Any) -> None:
        """Count epochs without a gain from the end of the warm-up on."""
        if state.global_step > args.get_warmup_steps(state.max_steps):
            super().on_evaluate(args, state, control, *metrics, **kwargs)


def train_on_labels(
    student: PreTrainedModel,
    rows: Any,
    validation: Any,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    training_rows: int,
    data_collator: Any,
    learning_rate: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Train by labels alone, as plain `Trainer` would; the epoch that is best on validation rows wins.

    It stops after three epochs without a gain, once the learning rate has risen, and has seen `training_rows` rows at
    most, or every row once.

    Args:
        student: The student before training.
        rows: Encoded rows with `labels`.
        validation: The same, held out.
        folder: Where its checkpoints and at the end its model are; finished with these settings, it is only opened.
        settings: All that the result depends on.
        training_rows: The budget.
        data_collator: What makes a batch.
        learning_rate: Its highest; by default 1e-3 for a student of width 160, scaled as the recipe's is
            ([`rate_for`]).
        arguments: More fields of `TrainingArguments`.
        seed: Of the order of the rows and the dropout.
    """
    learning_rate = rate_for(student, LEARNING_RATE) if learning_rate is None else learning_rate
    known = {**settings, "training_rows": training_rows, "learning_rate": learning_rate, "seed": seed}
    if is_done(folder, known):
        return type(student).from_pretrained(folder / "model", dtype=student.dtype)
    begin(folder, known)
    args = DistillationTrainingArguments(**{
        "output_dir": str(folder),
        "num_train_epochs": max(1, training_rows // max(len(rows), 1)),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": 32,
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "quality",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "seed": seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **(arguments or {}),
        "soft_target_weight": 0.0,
        "hard_label_weight": 1.0,
    })  # fmt: skip
    set_seed(seed)
    trainer = DistillationTrainer(
        student, args, data_collator, rows, validation, compute_metrics=quality,
        callbacks=[StopAfterWarmup(early_stopping_patience=PATIENCE)],
    )  # fmt: skip
    show_bars_only(trainer)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    trainer.model.save_pretrained(folder / "model")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finish(folder, known)
    return trainer.model


def quality(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy over what has a label; of a regression minus the mean squared error; of several labels a row the micro
    F1, and where that is the same (at first often 0) the smaller binary cross-entropy: more is better.
    """
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if logits.shape[-1] == 1:
        return {"quality": -float(np.square(logits.reshape(labels.shape) - labels).mean())}
    if logits.shape == labels.shape:
        entropy = float((np.logaddexp(0.0, logits) - labels * logits).mean())
        return {"quality": micro_f1(logits > 0, labels) - 1e-4 * entropy}
    counts = labels != -100
    return {"quality": float((logits.argmax(-1) == labels)[counts].mean())}
