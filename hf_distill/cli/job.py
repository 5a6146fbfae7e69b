"""The whole job: student, teaching, the same student without a teacher, report, card, export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from hf_distill.cli.data import load_splits
from hf_distill.cli.errors import UserError
from hf_distill.cli.flags import Flags, stages_of
from hf_distill.cli.models import load_model, load_processing_class
from hf_distill.export import export_student
from hf_distill.recipes import Compressed, Stage, answers, labels_of, train_on_labels
from hf_distill.recipes.job import Job as Recipe
from hf_distill.recipes.stages import CARD, LOG, content_of
from hf_distill.reports import DistillationReport
from hf_distill.reports.card_facts import CardFacts
from hf_distill.reports.measure import Cost, measure_cost
from hf_distill.reports.model_card import render
from hf_distill.reports.sources import inherited_license, source_of
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
        data, notes = load_splits(_required(self.flags.dataset, "--dataset"), self.flags.dataset_config)
        sizes = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        self.say(f"Data: {sizes} rows" + "".join(f"; {note}" for note in notes))
        return data

    @cached_property
    def task(self) -> Task:
        """What the teacher does with the data."""
        columns = self.flags.input_columns.split(",") if self.flags.input_columns else None
        task = Task.of(self.teacher, self.data["train"], columns, self.flags.label_column)
        if task.label is None:
            raise UserError(f"No column of {self.data['train'].column_names} holds labels. Name it: --label_column.")
        for name, part in self.data.items():
            if task.labels(part) is None:  # a wrong class is told now too
                raise UserError(f"The {name} split has no column {task.label!r}: {part.column_names}.")
        return task

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What the student learns, in order."""
        return stages_of(self.given)[0]

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

    def unlabelled(self) -> list[str]:
        """More texts to learn from."""
        if self.flags.unlabelled is None:
            return []
        try:
            return Path(self.flags.unlabelled).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--unlabelled {self.flags.unlabelled} cannot be read ({error}).") from error

    def baseline(self, made: Compressed) -> PreTrainedModel | None:
        """The same student, from the same start, without a teacher."""
        if not self.flags.baseline:
            return None
        start = type(made.student).from_pretrained(self.folder / "start")
        columns = [*self.task.inputs, str(self.task.label)]
        settings = {
            **{name: content_of(self.data[name], columns) for name in ("train", "validation")},
            "parameters": made.student.num_parameters(), "arguments": self.arguments,
        }  # fmt: skip
        return train_on_labels(
            start, self.rows("train", made), self.rows("validation", made), folder=self.folder / WITHOUT_TEACHER,
            settings=settings, training_rows=self.recipe().rows_to_see, arguments=self.arguments, seed=self.flags.seed,
            data_collator=self.task.collator(made.processing_class),
        )  # fmt: skip

    def rows(self, split: str, made: Compressed) -> Any:
        """Labelled rows as the student reads them."""
        if self.task.kind == "image":
            return ImageRows(self.task, self.data[split], made.processing_class)
        return self.task.encode(self.data[split], made.processing_class, self.flags.max_length)

    def report(self, made: Compressed, baseline: PreTrainedModel | None) -> DistillationReport:
        """All three on the test rows; report.json, report.md and report.html are written."""
        test, reader = self.data["test"], made.processing_class
        models = {"teacher": (self.teacher, self.reader), "student": (made.student, reader)}
        if baseline is not None:
            models["baseline"] = (baseline, reader)
        logits = {name: answers(m, self.task, test, r, self.flags.max_length) for name, (m, r) in models.items()}
        labels, read = np.asarray(labels_of(self.task, test)), _read_by_all(logits.values())
        folders = {"student": made.folder, "baseline": self.folder / WITHOUT_TEACHER / "model"}
        costs = {name: self._cost(m, r, folders.get(name)) for name, (m, r) in models.items()}
        report = DistillationReport.from_outputs(
            logits["student"][read], logits["teacher"][read], labels[read], costs=costs,
            baseline=logits["baseline"][read] if baseline is not None else None,
            class_names=self.task.classes or None, log_history={"student": self._log()},
            texts=_texts(self.task, test, read), notes=self._notes(read),
            temperature=self.stages[0].temperature,
        )  # fmt: skip
        figures = find_spec("matplotlib") is not None if self.flags.figures is None else self.flags.figures
        report.save(self.folder, figures=figures)
        return report

    def card(self, made: Compressed, report: DistillationReport) -> Path:
        """The student's model card."""
        facts = CardFacts.from_dict(json.loads((self.folder / self.stages[-1].name / CARD).read_text()))
        facts.title = f"{self.folder.name}: {type(made.student).__name__}"
        source = source_of(self.teacher.config, str(self.flags.teacher))
        facts.teachers, facts.uses_teacher = [source], True
        facts.base_models, facts.license = list(filter(None, [source.hub_id])), inherited_license(None, [source])
        facts.results = report.quality_table()
        facts.description = f"Made by `hf-distill`. The task: {self.task}."
        facts.data.names = facts.data.names or [Path(str(self.flags.dataset)).name]
        path = made.folder / "README.md"
        render(facts).save(path)
        return path

    def exported(self, made: Compressed) -> dict[str, Any]:
        """ONNX files of the student, measured on test rows."""
        rows = self._some(made.processing_class)
        collate = self.task.collator(made.processing_class)
        batches = [dict(collate(rows[:size])) for size in (1, 8)]
        return dict(export_student(str(made.folder), self.folder / "export", inputs=batches, overwrite=True))

    # ---- Parts ----

    def _cost(self, model: PreTrainedModel, reader: Any, folder: Path | None) -> Cost:
        folder = folder if folder is not None and any(folder.glob("model*.safetensors")) else None
        return measure_cost(model, self._some(reader), self.task.collator(reader), folder=folder, runs=50)

    def _some(self, reader: Any, number: int = 64) -> list[dict[str, Any]]:
        """Test rows without labels, as a model reads them."""
        part = self.data["test"].select(range(min(number, len(self.data["test"]))))
        rows = (
            ImageRows(self.task, part, reader) if self.task.kind == "image"
            else self.task.encode(part.select_columns(list(self.task.inputs)), reader, self.flags.max_length)
        )  # fmt: skip
        return [{name: value for name, value in rows[k].items() if name != "labels"} for k in range(len(part))]

    def _log(self) -> list[dict[str, Any]]:
        """What was logged in all stages, one after another."""
        history: list[dict[str, Any]] = []
        for stage in self.stages:
            before = history[-1]["step"] if history else 0
            lines = json.loads((self.folder / stage.name / LOG).read_text())
            history += [{**line, "step": line["step"] + before} for line in lines]
        return history

    def _notes(self, read: np.ndarray) -> list[str]:
        notes = [f"Nothing was chosen on the {len(self.data['test']):,} test rows."]
        if not read.all():
            notes.append(f"{int((~read).sum()):,} words are left out, since not every model read so far.")
        if self.flags.baseline:
            notes.append("The student without a teacher has the same start, and its best epoch on validation rows.")
        return notes


def _required(value: str | None, flag: str) -> str:
    if value is None:
        raise UserError(f"{flag} is missing. See hf-distill --help.")
    return value


def _read_by_all(logits: Any) -> np.ndarray:
    return np.asarray(np.stack([np.isfinite(values).all(-1) for values in logits]).all(0))


def _texts(task: Task, test: Dataset, read: np.ndarray) -> list[str] | None:
    if task.kind == "image":
        return None
    if task.kind == "words":
        words = [word for row in test[task.inputs[0]] for word in row]
        return [word for word, kept in zip(words, read, strict=True) if kept]
    return [" | ".join(row) for row in zip(*(test[name] for name in task.inputs), strict=True)]
