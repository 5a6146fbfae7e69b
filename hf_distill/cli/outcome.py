"""What is told of the students: the exported files, the report, the card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from hf_distill.cli.job import WITHOUT_TEACHER, Job
from hf_distill.export import export_student
from hf_distill.exported import ExportedStudent, session
from hf_distill.heads import forward_inputs
from hf_distill.layer_proposal import LayerProposal, propose_layer_mapping
from hf_distill.recipes import Compressed, answers, labels_of
from hf_distill.recipes.answers import answers_of
from hf_distill.recipes.stages import CARD, LOG
from hf_distill.reports import DistillationReport
from hf_distill.reports.card_facts import CardFacts
from hf_distill.reports.files import write_together
from hf_distill.reports.measure import Cost, latencies, measure_cost
from hf_distill.reports.model_card import render
from hf_distill.reports.sources import inherited_license, source_of
from hf_distill.tasks import Task
from hf_distill.transfer import ImageRows

RUNS = 50  # timed passes at batch 1


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        job: What was asked for.
        made: The student.
        baseline: The same student without a teacher, where there is one.
        files: The exported students, once they are.
    """

    job: Job
    made: Compressed
    baseline: PreTrainedModel | None = None
    files: dict[str, ExportedStudent] = field(default_factory=dict)

    def exported(self) -> dict[str, ExportedStudent]:
        """ONNX files of the student, checked on test rows; from then on the report tells of them too."""
        rows = self._some(self.made.processing_class)
        batches = [dict(self._collate(rows[:size])) for size in (1, 8)]
        folder = self.job.folder / "export"
        self.files = export_student(str(self.made.folder), folder, inputs=batches, overwrite=True)
        return self.files

    def report(self) -> DistillationReport:
        """All models on the test rows; report.json, report.md and report.html are written."""
        job, test = self.job, self.job.data["test"]
        models = self._models()
        logits = {name: answers(m, job.task, test, r, job.length) for name, (m, r) in models.items()}
        ours, costs = self._answers_of_files(), self._costs(models)
        labels = np.asarray(labels_of(job.task, test))
        read = _read_by_all(job.task, [*logits.values(), *ours.values()])
        notes = [*self._notes(read), *_parity(job.task, ours, logits["student"], read)]
        report = DistillationReport.from_outputs(
            logits["student"][read], logits["teacher"][read], labels[read], costs=costs,
            baseline=logits["baseline"][read] if self.baseline is not None else None,
            others={name: each[read] for name, each in ours.items()},
            class_names=job.task.classes or None, log_history=self._log(), problem=_problem(job.task),
            texts=_texts(job.task, test, read), images=_images(job.task, test), notes=notes, layers=self._layers(),
            temperature=job.stages[0].temperature, unit="words" if job.task.kind == "words" else None,
        )  # fmt: skip
        figures = find_spec("matplotlib") is not None if job.flags.figures is None else job.flags.figures
        report.save(job.folder, figures=figures)
        return report

    def card(self, report: DistillationReport) -> Path:
        """The student's model card."""
        job = self.job
        made = {stage.name: (job.folder / stage.name / CARD).read_text() for stage in job.stages}
        stages = {name: CardFacts.from_dict(json.loads(text)) for name, text in made.items()}
        facts = stages[job.stages[-1].name]
        facts.equation = "\n".join(_stage_line(name, each) for name, each in stages.items())
        facts.layers = {name: pairs for each in stages.values() for name, pairs in each.layers.items()}
        facts.citations = list(dict.fromkeys(citation for each in stages.values() for citation in each.citations))
        facts.has_processor = self.made.processing_class is not None
        facts.pair = len(job.task.inputs) == 2
        facts.title = f"{job.folder.name}: {type(self.made.student).__name__}"
        source = source_of(job.teacher.config, str(job.flags.teacher))
        facts.teachers, facts.uses_teacher = [source], True
        facts.base_models, facts.license = list(filter(None, [source.hub_id])), inherited_license(None, [source])
        facts.results = report.quality_table()
        number = "one stage, which" if len(stages) == 1 else f"{len(stages)} stages, the last of which"
        facts.description = f"Made by `hf-distill` in {number} had the arguments below. The task: {job.task}."
        facts.data.names = facts.data.names or [Path(str(job.flags.dataset)).name]
        return write_together(self.made.folder, {"README.md": str(render(facts))})["README.md"]

    # ---- Parts ----

    def _models(self) -> dict[str, tuple[PreTrainedModel, Any]]:
        reader = self.made.processing_class
        models = {"teacher": (self.job.teacher, self.job.reader), "student": (self.made.student, reader)}
        return models if self.baseline is None else {**models, "baseline": (self.baseline, reader)}

    def _layers(self, rows: int = 256, batch_size: int = 32) -> LayerProposal | None:
        """How alike both models' layers are on test rows; `None` where that cannot be told."""
        views = []
        for model, reader in list(self._models().values())[:2]:  # teacher, student
            some, collate = self._some(reader, rows), self.job.task.collator(reader)
            parts = [some[start : start + batch_size] for start in range(0, len(some), batch_size)]
            views.append((model, [forward_inputs(model, collate(part)) for part in parts]))
        (teacher, theirs), (student, ours) = views
        try:
            return propose_layer_mapping(student, teacher, ours, teacher_batches=theirs)
        except ValueError:  # convolutions, a deeper student
            return None

    def _answers_of_files(self) -> dict[str, np.ndarray]:
        """The exported students' logits about all test rows."""
        job = self.job
        return {
            name: answers_of(
                _first_of(session(file.folder / "model.onnx", 1)), job.task, job.data["test"],
                self.made.processing_class, job.length,
            )
            for name, file in self.files.items()
        }  # fmt: skip

    def _costs(self, models: Mapping[str, tuple[PreTrainedModel, Any]]) -> dict[str, Cost]:
        folders = {"student": self.made.folder, "baseline": self.job.folder / WITHOUT_TEACHER / "model"}
        costs = {name: self._cost(m, r, folders.get(name)) for name, (m, r) in models.items()}
        rows = self._some(self.made.processing_class) if self.files else []
        for name, file in self.files.items():
            run = _first_of(session(file.folder / "model.onnx", 1))
            timed = latencies(lambda run=run, **batch: run(batch), rows, self._collate, runs=RUNS)
            costs[name] = Cost(disk_mb=file.megabytes, latency=timed)
        return costs

    def _cost(self, model: PreTrainedModel, reader: Any, folder: Path | None) -> Cost:
        folder = folder if folder is not None and any(folder.glob("model*.safetensors")) else None
        return measure_cost(model, self._some(reader), self.job.task.collator(reader), folder=folder, runs=RUNS)

    def _collate(self, rows: list[Any]) -> Any:
        return self.job.task.collator(self.made.processing_class)(rows)

    def _some(self, reader: Any, number: int = 64) -> list[dict[str, Any]]:
        """Test rows without labels, as a model reads them."""
        task, test = self.job.task, self.job.data["test"]
        part = test.select(range(min(number, len(test))))
        rows = (
            ImageRows(task, part, reader) if task.kind == "image"
            else task.encode(part.select_columns(list(task.inputs)), reader, self.job.length)
        )  # fmt: skip
        return [{name: value for name, value in rows[k].items() if name != "labels"} for k in range(len(part))]

    def _log(self) -> dict[str, list[dict[str, Any]]]:
        """What was logged in all stages, one after another; of a student from elsewhere nothing is known."""
        if self.made.folder != self.job.folder / "student":
            return {}
        history: list[dict[str, Any]] = []
        for stage in self.job.stages:
            before = history[-1]["step"] if history else 0
            lines = json.loads((self.job.folder / stage.name / LOG).read_text())
            history += [{**line, "step": line["step"] + before} for line in lines]
        return {"student": history}

    def _notes(self, read: np.ndarray) -> list[str]:
        notes = [f"Nothing was chosen on the {len(self.job.data['test']):,} test rows."]
        if not read.all():
            notes.append(f"{int((~read).sum()):,} words are left out, since not every model read so far.")
        if self.job.flags.baseline:
            notes.append("The student without a teacher has the same start, and its best epoch on validation rows.")
        return notes


def _stage_line(name: str, facts: CardFacts) -> str:
    steps, rows = facts.arguments["max_steps"], facts.data.train_rows
    return f"{name}, {steps:,} steps over {rows:,} rows: {facts.equation}"


def _first_of(run: Any) -> Any:
    """A classifier's graph gives one tensor of logits."""
    return lambda batch: run(batch)[0]


def _parity(task: Task, files: Mapping[str, np.ndarray], student: np.ndarray, read: np.ndarray) -> list[str]:
    """How far the exported students are from the student that they were made from."""
    notes = []
    for name, logits in files.items():
        apart = np.abs(logits[read] - student[read]).max()
        both = (each[read] > 0 if task.several else each[read].argmax(-1)[:, None] for each in (logits, student))
        same = np.equal(*both).all(-1).mean()
        answers = f" the student's answer in {100 * same:.1f} % of them," if task.classes else ""
        notes.append(
            f"{name}, the exported student, run on all test rows:{answers} logits differ by up to {apart:.2g}."
        )
    return notes


def _problem(task: Task) -> str:
    if task.several:
        return "multi_label_classification"
    return "single_label_classification" if task.classes else "regression"


def _read_by_all(task: Task, logits: Any) -> np.ndarray:
    """Which rows, or words, every model has read: a word that was cut off is answered by NaN.

    A model that answers nothing else has diverged, which is for the report to say.
    """
    if task.kind != "words":
        return np.ones(len(logits[0]), bool)
    read = [~np.isnan(values).all(-1) for values in logits]
    return np.asarray(np.stack([some for some in read if some.any()] or [~some for some in read]).all(0))


def _texts(task: Task, test: Dataset, read: np.ndarray) -> list[str] | None:
    if task.kind == "image":
        return None
    if task.kind == "words":
        words = [word for row in test[task.inputs[0]] for word in row]
        return [word for word, kept in zip(words, read, strict=True) if kept]
    return [" | ".join(row) for row in zip(*(test[name] for name in task.inputs), strict=True)]


def _images(task: Task, test: Dataset) -> Any:
    return test.with_format(None)[task.inputs[0]] if task.kind == "image" else None
