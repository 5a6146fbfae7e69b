"""Asking a teacher about a dataset, outside a trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import nn

from hf_distill.activations import Needs
from hf_distill.teachers.cache import Collate
from hf_distill.teachers.cached import LABELS
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.keeper import CacheKeeper
from hf_distill.teachers.kept_logits import KeptLogits
from hf_distill.teachers.online import OnlineTeacher
from hf_distill.teachers.rows import fetch, row_lengths

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_teacher_outputs(
    dataset: datasets.Dataset,
    teacher: nn.Module | OnlineTeacher | EnsembleTeacher,
    needs: Needs = Needs(logits=True),  # noqa: B008 (frozen)
    *,
    data_collator: Collate,
    cache_dir: str | os.PathLike[str],
    batch_size: int = 32,
    dtype: str = "float32",
    state_dtype: str = "float16",
    logits: str = "full",
    top_k: int = 64,
    label_names: Sequence[str] = tuple(sorted(LABELS)),
    progress: bool = True,
) -> datasets.Dataset:
    """Ask a teacher once about every row; the dataset with what it said as columns.

    The columns are `teacher_logits`, `teacher_hidden_states_<index>` and `teacher_attentions_<index>`;
    [`DistillationTrainer`] learns from them without a teacher. The dataset can be saved and pushed to the Hub like
    any other. The files in `cache_dir` are those of `teacher_cache_dir`: an interrupted call goes on where it was.
    For many hidden states prefer `teacher_cache_dir`, which reads them without making Python lists of them.

    Args:
        dataset: Tokenised rows, or whatever `data_collator` takes; without columns that it cannot batch.
        teacher: A model with a head, or several as an [`EnsembleTeacher`].
        needs: Outputs to keep; hidden states and attention maps by their indices.
        data_collator: Makes a batch of rows, as in training. It must not change rows at random.
        cache_dir: Where the answers are kept.
        batch_size: Rows that the teacher is asked about at once; those of like length go together.
        dtype: Precision that the teacher computes in: `"float32"`, `"bfloat16"` or `"float16"`.
        state_dtype: Precision of stored hidden states, attention maps and log-probabilities: `"float16"` or
            `"float32"`.
        logits: What is kept of a language model's logits, as `teacher_cache_logits`: `"full"`; `"hidden_state"`, the
            last hidden state at supervised positions, of which training makes logits with the head of its
            `teacher_model`; or `"top_k"`. Their columns are those of [`KeptLogits`].
        top_k: How many classes `"top_k"` keeps.
        label_names: Columns of a batch that the teacher does not see.
        progress: Whether to show a bar.

    Raises:
        ValueError: If the needs name no indices, rows change when they are read again, or a value does not fit.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {tuple(_DTYPES)}, got {dtype!r}.")
    asked = teacher if isinstance(teacher, OnlineTeacher | EnsembleTeacher) else OnlineTeacher(teacher)
    labels = [*label_names, "start_positions", "end_positions"]
    keeper = CacheKeeper(
        str(cache_dir), asked, asked.head, labels, _DTYPES[dtype], state_dtype, KeptLogits(logits, top_k)
    )
    cache = keeper.cache(needs)
    report = keeper.fill(
        dataset, dataset, data_collator, batch_size=batch_size, rank=0, world=1, progress=progress,
        barrier=lambda: None,
    )  # fmt: skip
    if report is not None and progress:
        print(report.line(cache.folder))
    rows: dict[str, list[Any]] = {name: [] for name in cache.store.columns}
    for start in range(0, len(row_lengths(dataset)), batch_size):
        features = fetch(dataset, range(start, min(start + batch_size, len(dataset))))
        where = cache.store.find(cache.keys(data_collator(features)))
        for name in rows:
            rows[name] += [row.tolist() for row in cache.store.read(where, name)]
    for name, values in rows.items():
        dataset = dataset.add_column(name, values)
    return dataset
