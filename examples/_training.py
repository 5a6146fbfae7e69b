"""What the examples' training runs share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, ProgressCallback, Trainer


class QuietProgress(ProgressCallback):
    """Trainer's progress bars without its log lines; the job prints a line of its own per stage."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


def precision(bf16: bool) -> dict[str, bool]:
    """The arguments for bf16 or fp32; Trainer takes bf16 on a CPU only where it is told that the CPU is meant."""
    return {"bf16": bf16, "use_cpu": bf16 and not torch.cuda.is_available()}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers (`evaluate.load("accuracy")` would need the Hub)."""
    answers = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((answers == prediction.label_ids).mean())}


def accuracy_of_classes(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers among the labelled positions; the predictions are [`best_classes`]."""
    labels = np.asarray(prediction.label_ids)
    return {"accuracy": float((np.asarray(prediction.predictions) == labels)[labels != -100].mean())}


def best_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The best class of each position, so that no logits are kept."""
    return logits.argmax(-1)


def train(trainer: Trainer) -> list[float]:
    """Train with bars only; returns the validation accuracy of each epoch that was evaluated."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    trainer.train()
    return [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
