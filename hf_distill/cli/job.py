"""The whole job: what was asked for, and the students that come of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from hf_distill.class_labels import IGNORED, class_names, flat
from hf_distill.cli.data import load_splits, load_unlabelled, with_one_column_of_labels
from hf_distill.cli.errors import UserError
from hf_distill.cli.flags import Flags, stages_of
from hf_distill.cli.models import load_model, load_processing_class
from hf_distill.recipes import Compressed, Stage, train_on_labels
from hf_distill.recipes.job import Job as Recipe
from hf_distill.recipes.reading import readable_length
from hf_distill.recipes.stages import content_of, made_by, stages_for, with_effect
from hf_distill.tasks import Task
from hf_distill.transfer import ImageRows

Say = Callable[[str], None]
WITHOUT_TEACHER = "without_teacher"


@dataclass
class Job:
    """What was asked for, and what is made of it.

    Attributes:
        flags: Our flags.
        given: Fields of `DistillationTrainingArguments` that were given.
        say: Prints a line for a person.
    """

    flags: Flags
    given: dict[str, Any]
    say: Say

    # ---- What there is ----

    @cached_property
    def folder(self) -> Path:
        """Where everything goes; made, and tried by writing."""
        folder = Path(self.flags.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}).") from error
        return folder

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher."""
        return load_model(_required(self.flags.teacher, "--teacher"))

    @cached_property
    def reader(self) -> Any:
        """The teacher's tokenizer or image processor."""
        image = self.task.kind == "image" and self.task.inputs[0] == "pixel_values"
        return load_processing_class(_required(self.flags.teacher, "--teacher"), self.teacher, required=not image)

    @cached_property
    def data(self) -> DatasetDict:
        """The three splits."""
        data, notes = load_splits(
            _required(self.flags.dataset, "--dataset"), self.flags.dataset_config, self.flags.label_column,
            self.classes_of_a_row,
        )  # fmt: skip
        sizes = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        self.say(f"Data: {sizes} rows" + "".join(f"; {note}" for note in notes))
        return data

    @property
    def classes_of_a_row(self) -> list[str]:
        """The classes of a teacher that gives several a row; none of any other."""
        config: Any = self.teacher.config
        several = config.problem_type == "multi_label_classification"
        return [config.id2label[place] for place in range(config.num_labels)] if several else []

    @cached_property
    def task(self) -> Task:
        """What the teacher does with the data."""
        columns = [name.strip() for name in self.flags.input_columns.split(",")] if self.flags.input_columns else None
        if self.flags.label_column is None:
            self.data = with_one_column_of_labels(self.data, self.classes_of_a_row)
        task = Task.of(self.teacher, self.data["train"], columns, self.flags.label_column)
        if task.label is None:
            raise UserError(f"No column of {self.data['train'].column_names} holds labels. Name it: --label_column.")
        for name, part in list(self.data.items()):
            part = self.data[name] = self.without_gaps(name, part, task)
            if task.labels(part) is None:  # a wrong class is told now too
                raise UserError(f"The {name} split has no column {task.label!r}: {part.column_names}.")
        return task

    def without_gaps(self, name: str, part: Dataset, task: Task) -> Dataset:
        """The rows that hold something to read and a label: csv files take NA, null and nothing for None, others NaN;
        several labels a row may be hidden behind -1.
        """
        gaps = (
            {-1, "-1", IGNORED} if task.several and class_names(self.data["train"], str(task.label)) is None else set()
        )
        columns = [task.label] if task.kind == "image" else [*task.inputs, task.label]
        for column in (column for column in columns if column in part.column_names):
            hidden = gaps if column == task.label else set()
            rows = enumerate(part.with_format(None)[column][:])
            kept = [k for k, row in rows if not any(x is None or x != x or x in hidden for x in flat(row))]
            if len(kept) < len(part):
                self.say(f"{len(part) - len(kept):,} {name} rows have nothing in {column} and are left out")
                part = part.select(kept)
        if not len(part):
            raise UserError(f"No {name} row is left.")
        return part

    @cached_property
    def length(self) -> int | None:
        """Tokens that are read of a text; of images `None`."""
        return None if self.task.kind == "image" else readable_length(self.flags.max_length or 512, self.teacher)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What the student learns, in order."""
        return stages_for(self.task.kind, stages_of(self.given)[0])

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` for every stage."""
        own = {"disable_tqdm": True} if self.flags.json else {}
        return {**own, **stages_of(self.given)[1]}

    # ---- What is made ----

    def compressed(self) -> Compressed:
        """The student."""
        return self.recipe().run()

    def recipe(self, **changes: Any) -> Recipe:
        """What [`compress`] does, for its parts."""
        flags, task = self.flags, self.task
        held_out = [self.data[name] for name in ("validation", "test")]
        texts: list[Any] = []
        if task.kind != "image":
            rows = [zip(*(part[name] for name in task.inputs), strict=True) for part in held_out]
            texts = [row[0] if len(task.inputs) == 1 else row for part in rows for row in part]
        settings = {
            "compression": flags.compression, "max_parameters": flags.max_parameters, "max_mb": flags.max_mb,
            "vocabulary_size": flags.vocabulary_size, "unlabelled": self.unlabelled(), "exclude": texts,
            "augmented_rows": flags.augmented_rows, "training_rows": flags.training_rows, "stages": self.stages,
            "input_columns": task.inputs, "label_column": task.label, "max_length": flags.max_length,
            "arguments": self.arguments, "seed": flags.seed, "output_dir": self.folder,
        }  # fmt: skip
        return Recipe(self.teacher, self.reader, self.data["train"], **{**settings, **changes})

    def unlabelled(self) -> Dataset | list[str]:
        """More rows to learn from."""
        return [] if self.flags.unlabelled is None else load_unlabelled(self.flags.unlabelled)

    def baseline(self, made: Compressed) -> PreTrainedModel | None:
        """The same student, from the same start, without a teacher."""
        if not self.flags.baseline:
            return None
        start = type(made.student).from_pretrained(self.folder / "start")
        columns = [*self.task.inputs, str(self.task.label)]
        recipe = self.recipe()
        parts = {"train": recipe.train_dataset, "validation": self.data["validation"]}  # nothing held out to train on
        settings = {
            **{name: content_of(part, columns) for name, part in parts.items()},
            "start": made_by(self.folder / "start"), "max_length": self.length,
            "arguments": with_effect(self.arguments),
        }  # fmt: skip
        return train_on_labels(
            start, *(self.rows(part, made) for part in parts.values()), folder=self.folder / WITHOUT_TEACHER,
            settings=settings, training_rows=recipe.rows_to_see, arguments=self.arguments, seed=self.flags.seed,
            data_collator=self.task.collator(made.processing_class),
        )  # fmt: skip

    def rows(self, part: Dataset, made: Compressed) -> Any:
        """Labelled rows as the student reads them."""
        if self.task.kind == "image":
            return ImageRows(self.task, part, made.processing_class)
        return self.task.encode(part, made.processing_class, self.length)


def _required(value: str | None, flag: str) -> str:
    if value is None:
        raise UserError(f"{flag} is missing. See hf-distill --help.")
    return value
