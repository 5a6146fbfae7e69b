"""Losses that learn something from data before the first step (`DistillationLoss.fit`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor

from hf_distill.activations import Activations
from hf_distill.batch import Batch
from hf_distill.caching import collator_after_filling
from hf_distill.preflight import as_loaded, ask_student
from hf_distill.random_state import preserved_random_state
from hf_distill.teachers.rows import fetch, is_stream

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer


def fit_losses(trainer: DistillationTrainer) -> None:
    """Show training rows to every loss that learns from them and has not: not if a checkpoint brought what it learned.

    All processes see the same rows, and keep what the first of them has learned.

    Raises:
        ValueError: If the training data cannot be read beforehand.
    """
    for name, loss in trainer.losses.active().items():
        if not loss.fit_rows or bool(loss.fitted):
            continue
        with preserved_random_state(trainer.args.seed), torch.no_grad():
            loss.fit(_answers(trainer, name, loss.fit_rows))
        loss.fitted.fill_(True)
        for buffer in loss.buffers():
            buffer.copy_(broadcast(buffer.clone()))


def _answers(trainer: DistillationTrainer, name: str, count: int) -> Iterator[tuple[Activations, Activations, Batch]]:
    """What the loss' forward would be given for some rows of the training data."""
    loss, student, device = trainer.losses[name], trainer.model, trainer.args.device
    dataset: Any = trainer.train_dataset
    collator = collator_after_filling(trainer, dataset, training=True)
    rows, collate = as_loaded(trainer, dataset, collator)
    size = trainer.args.per_device_train_batch_size
    chosen = _spread(rows, name, count)
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        inputs = collate(some if is_stream(rows) else fetch(rows, some))
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        teacher = trainer._ask_teacher(inputs, loss.teacher_needs, required=True)
        answer = ask_student(trainer, student, inputs, loss.student_needs)
        yield answer, teacher or Activations(), Batch.from_inputs(inputs, trainer.head)


def _spread(dataset: Any, name: str, count: int) -> list[Any]:
    """Indices of rows spread evenly over a dataset, which may be sorted; of a stream its first rows themselves."""
    if isinstance(dataset, datasets.IterableDataset):
        return list(dataset.take(count))
    if dataset is None or is_stream(dataset):
        raise ValueError(
            f"The loss {name!r} learns from {count} training rows before the first step, but {type(dataset).__name__} "
            "can be read only once. Pass a dataset with a length, or a datasets.IterableDataset, as train_dataset."
        )
    return np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
