"""What a model answers about raw rows, one line an example, whatever tokenizer it reads them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_distill.heads import forward_inputs, in_eval_mode
from hf_distill.recipes.reading import readable_length
from hf_distill.tasks import Task
from hf_distill.transfer.places import word_ids
from hf_distill.transfer.views import ImageRows


def answers(
    model: PreTrainedModel, task: Task, dataset: Dataset, processing_class: Any, max_length: int | None = None,
    batch_size: int = 32,
) -> np.ndarray:  # fmt: skip
    """A model's logits about every row, or about every word of every row, in their order.

    So the answers of models with different tokenizers stand side by side. A word that a model did not read, because
    its text was cut, is answered by NaN.

    Shape:
        (N, V) for N rows or, of words, N words.
    """
    longest = readable_length(max_length or 512, model)
    with torch.no_grad(), in_eval_mode(model):
        return answers_of(
            lambda batch: model(**forward_inputs(model, batch)).logits,
            task, dataset, processing_class, longest, batch_size,
        )  # fmt: skip


def answers_of(
    run: Callable[[Mapping[str, Any]], torch.Tensor], task: Task, dataset: Dataset, processing_class: Any,
    max_length: int | None = None, batch_size: int = 32,
) -> np.ndarray:  # fmt: skip
    """As [`answers`], of anything that makes logits of a batch."""
    columns = list(task.inputs)
    rows: Any
    if task.kind == "image":
        rows, words = ImageRows(task, dataset, processing_class), None
        order = np.arange(len(rows))
    else:
        rows = task.encode(dataset.select_columns(columns), processing_class, max_length)
        words = word_ids(task, dataset, processing_class, max_length) if task.kind == "words" else None
        order = np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable")
    collate = task.collator(processing_class)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size].tolist()
        features = [{name: value for name, value in rows[k].items() if name != "labels"} for k in chosen]
        found.update(zip(chosen, run(collate(features)).float().cpu().numpy(), strict=True))
    if words is None:
        return np.stack([found[k] for k in range(len(order))]) if len(order) else np.zeros((0, 0))
    lengths = [len(row) for row in dataset[columns[0]]]
    parts = [_of_words(found[k], words[k], lengths[k]) for k in range(len(order))]
    return np.concatenate(parts) if parts else np.zeros((0, 0))


def labels_of(task: Task, dataset: Dataset) -> np.ndarray | None:
    """The labels of the same examples. Shape: (N,); `None` if there are none."""
    labels = task.labels(dataset)
    if labels is None:
        return None
    return np.concatenate([np.asarray(row) for row in labels]) if task.kind == "words" else np.asarray(labels)


def _of_words(logits: np.ndarray, words: list[int | None], number: int) -> np.ndarray:
    """The logits at the first token of each word."""
    out = np.full((number, logits.shape[-1]), np.nan, np.float32)
    for place in reversed(range(len(words))):
        word = words[place]
        if word is not None:
            out[word] = logits[place]
    return out
