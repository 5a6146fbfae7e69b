"""What `size_vs_retention.py` can be asked for, and what it starts from: teacher, task, rows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _movie_data import movie_sentences
from _sentence_job import option
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedModel

from hf_distill.cli.data import load_as_is, load_splits
from hf_distill.cli.errors import UserError
from hf_distill.cli.models import load_model, load_processing_class
from hf_distill.recipes import answers, labels_of
from hf_distill.tasks import IGNORED, Task

SPLITS = ("train", "validation", "test")


@dataclass
class Sizes:
    """What to run.

    The recipe's own settings were chosen on the validation rows of the movie sentences at 10x; see
    `hf_distill.recipes`.
    """

    teacher: str = option("out/teacher", "Folder or name of a fine-tuned classifier.")
    output_dir: str = option("out/sizes", "Where students, table and figure go.")
    compressions: str = option("10,30,100", "How many times smaller, separated by commas.")
    seeds: int = option(1, "How many times each is trained.")
    baselines: bool = option(True, "Also train by labels alone.")
    training_rows: int | None = option(None, "Rows that a student sees; the recipe's default if unset.")
    augmented_rows: int | None = option(None, "New rows for the teacher to judge; the recipe's default if unset.")
    data: str | None = option(
        None, "Name on the Hub, file (csv, json, parquet) or folder (also of `save_to_disk`); the movie sentences."
    )
    data_config: str | None = option(None, "Configuration of the dataset.")
    input_columns: str | None = option(None, "The columns to read, separated by a comma, if names do not tell.")
    label_column: str | None = option(None, "The column of classes, likewise.")
    unlabelled: str | None = option(None, "More rows to learn from: a text file, one a line, or a dataset.")
    held_out: str | None = option(None, "Rows on which to measure agreement only, likewise; none is learnt from.")
    held_out_rows: int = option(4000, "How many of them.")
    max_length: int | None = option(None, "Tokens that are read of a text; 48 of a movie sentence.")
    max_train_rows: int | None = option(None, "Train on the first rows only.")
    max_eval_rows: int | None = option(None, "Validate and test on the first rows only.")
    batch_size: int = option(32, "Rows of a training step.")
    learning_rates: str = option(
        "2.5e-4,5e-4,1e-3",
        "Of students of width 160 that learn from labels alone, scaled as the recipe's; the best is taken.",
    )


@dataclass
class Start:
    """What every student of the curve has in common.

    Attributes:
        job: What was asked for.
        teacher: The teacher.
        reader: Its tokenizer or image processor.
        task: What it does with the rows.
        data: The three splits.
        unlabelled: More rows to learn from.
        held_out: Rows for agreement alone.
    """

    job: Sizes
    teacher: PreTrainedModel
    reader: Any
    task: Task
    data: DatasetDict
    unlabelled: Dataset | None = None
    held_out: Dataset | None = None

    @classmethod
    def of(cls, job: Sizes) -> Start:
        """Load it all.

        Raises:
            SystemExit: If something is missing, or the task has no accuracy.
        """
        try:
            teacher = load_model(job.teacher)
            data = movie_sentences()[0] if job.data is None else load_splits(job.data, job.data_config)[0]
            columns = job.input_columns.split(",") if job.input_columns else None
            task = Task.of(teacher, data["train"], columns, job.label_column)
            plain = task.kind == "image" and task.inputs[0] == "pixel_values"
            reader = load_processing_class(job.teacher, teacher, required=not plain)
        except (UserError, ValueError) as error:
            raise SystemExit(str(error)) from error
        if not task.classes or task.several or task.label is None:
            raise SystemExit(
                "The curve is one of accuracy, so the teacher must classify, with one class an answer, and the rows "
                "be labelled."
            )
        limits = {"train": job.max_train_rows, "validation": job.max_eval_rows, "test": job.max_eval_rows}
        data = DatasetDict({name: first(data[name], limits[name]) for name in SPLITS})
        if job.data is None and job.max_length is None:
            job.max_length = 48
        start = cls(job, teacher, reader, task, data)
        if job.unlabelled:
            start.unlabelled = read_rows(job.unlabelled, task)
        if job.held_out:
            rows = read_rows(job.held_out, task)
            chosen = random.Random(0).sample(range(len(rows)), min(job.held_out_rows, len(rows)))
            start.held_out = rows.select(sorted(chosen))
        return start

    def exclude(self) -> Any:
        """The rows that nothing may learn from; images come from `train` alone."""
        if self.task.kind == "image":
            return ()
        parts = [self.data["validation"], self.data["test"], *filter(None, [self.held_out])]
        columns = [[value for part in parts for value in part[name]] for name in self.task.inputs]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, one an example. Shape: (N,)."""
        return np.asarray(labels_of(self.task, self.data[split]))

    def answers(self, model: PreTrainedModel, reader: Any) -> dict[str, np.ndarray]:
        """A model's classes on `validation`, `test` and `held_out`; -100 for a word that was cut off. Shape: (N,)."""
        parts = {name: self.data[name] for name in ("validation", "test")}
        parts |= {} if self.held_out is None else {"held_out": self.held_out}
        found = {}
        for name, part in parts.items():
            logits = answers(model, self.task, part, reader, self.job.max_length)
            found[name] = np.where(np.isfinite(logits).all(-1), np.nan_to_num(logits).argmax(-1), IGNORED)
        return found


def first(part: Dataset, limit: int | None) -> Dataset:
    """The first rows, or all."""
    return part.select(range(min(limit or len(part), len(part))))


def read_rows(source: str, task: Task) -> Dataset:
    """Rows with the columns that the task reads.

    Args:
        source: A text file with a row a line (a pair's texts apart by a tab, words by spaces), or anything that
            `--data` takes.
        task: Which columns.

    Raises:
        SystemExit: If the rows cannot be read, or have other columns.
    """
    if Path(source).suffix == ".txt":
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") if len(task.inputs) == 2 else [line] for line in lines if line.strip()]
        wrong = next((row for row in rows if len(row) != len(task.inputs)), None)
        if task.kind == "image" or wrong:
            need = "a dataset, since they are images" if wrong is None else f"a tab in each line, unlike {wrong}"
            raise SystemExit(f"The rows of {source} need {need}.")
        values = zip(*rows, strict=True)
        texts = [[text.split() for text in column] if task.kind == "words" else list(column) for column in values]
        return Dataset.from_dict(dict(zip(task.inputs, texts, strict=True)))
    try:
        found = load_as_is(source)
    except UserError as error:
        raise SystemExit(str(error)) from error
    parts = [found] if isinstance(found, Dataset) else list(found.values())
    lacking = [name for name in task.inputs if name not in parts[0].column_names]
    if lacking:
        raise SystemExit(f"{source} lacks the column {lacking[0]!r}: it has {parts[0].column_names}.")
    return concatenate_datasets([part.select_columns(list(task.inputs)) for part in parts])
