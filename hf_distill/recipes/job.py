"""How [`compress`] goes from a teacher to a student: the student before training, then stage after stage."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from hf_distill.recipes.embeddings import map_embedding
from hf_distill.recipes.material import Material
from hf_distill.recipes.reading import require_fit, require_image_processor, require_tokenizer, without_dropout
from hf_distill.recipes.stages import (
    Stage,
    begin,
    content_of,
    fingerprint_of,
    finish,
    frozen,
    frozen_as,
    is_done,
    run_stage,
    with_effect,
)
from hf_distill.students import create_student, trim_vocabulary
from hf_distill.students.budget import NoShapeError, count, parameter_budget
from hf_distill.tasks import Task
from hf_distill.teachers.fingerprint import model_fingerprint
from hf_distill.trainer import DistillationTrainer
from hf_distill.training_args import DistillationTrainingArguments
from hf_distill.writing import alone_in, whole_files


@dataclass
class Compressed:
    """What [`compress`] made.

    Attributes:
        student: The trained student.
        processing_class: What it reads with: a tokenizer with fewer tokens, or the teacher's image processor.
        task: What the data was taken for.
        folder: Where student and processing class are, for `from_pretrained` and `pipeline`.
        training_rows: How many rows the student saw, where it was made just now.
    """

    student: PreTrainedModel
    processing_class: Any
    task: Task
    folder: Path
    training_rows: int | None = None


class Job(Material):
    """Makes what [`compress`] was asked for."""

    def run(self) -> Compressed:
        """Everything, in order; student and processing class are then in `folder/student`."""
        self._check()
        print(f"Task: {self.task}")
        with alone_in(self.folder):
            return self._run()

    def _run(self) -> Compressed:
        tokenizer, student = self.start()
        settings: dict[str, Any] = {
            "start": fingerprint_of([self._start_settings(), str(student.config)]),
            "labels": content_of(self.train_dataset, [self.task.label]) if self.task.label else None,
            "training_rows": self.rows_to_see, "arguments": with_effect(self.stage_arguments), "seed": self.seed,
            "min_confidence": self.min_confidence, "max_length": self.max_length, "states": asdict(self.states),
            "embedding": None if self.task.kind == "image" else "mapped",
        }  # fmt: skip
        collator = self.task.collator(tokenizer)
        together = {"prepare": partial(
            map_embedding, tokenizer=tokenizer, teacher=self.teacher, processing_class=self.processing_class
        )}  # fmt: skip
        for stage in self.stages:
            mapped = together if self.moves_together(stage) else {}
            settings = {"before": fingerprint_of(settings), **settings, "stage": asdict(stage),
                        "embedding": "mapped" if mapped else None}  # fmt: skip
            student = run_stage(
                stage, student, partial(self.rows, stage, tokenizer), self.losses(stage, student),
                folder=self.folder / stage.name, settings=settings,
                training_rows=round(stage.share * self.rows_to_see),
                arguments=self.stage_arguments,
                data_collator=collator, seed=self.seed, **mapped,
            )  # fmt: skip
        target = self.folder / "student"
        with whole_files(target) as unfinished:
            student.eval().save_pretrained(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
        return Compressed(student, tokenizer, self.task, target, self.rows_to_see)

    def moves_together(self, stage: Stage) -> bool:
        """Whether word embeddings move by one map; each by itself where a tagger learns its own words ("Small taggers"
        in README.md).
        """
        return self.task.kind == "text" or (self.task.kind == "words" and stage.data == "transfer")

    def trial(self, rows: int = 64) -> tuple[DistillationTrainer, PreTrainedModel]:
        """A trainer for the last stage on the first rows alone, and its student: to see that everything fits."""
        tokenizer, student = self.start()
        number = min(rows, len(self.train_dataset))
        few = replace(self, train_dataset=self.train_dataset.select(range(number)), unlabelled=(), augmented_rows=0)
        args = DistillationTrainingArguments(**{
            "output_dir": str(self.folder / "trial"), "report_to": "none", "per_device_train_batch_size": 8,
            **self.stage_arguments,
        })  # fmt: skip
        stage, collator = self.stages[-1], self.task.collator(tokenizer)
        return DistillationTrainer(
            student, args, collator, few.rows(stage, tokenizer), losses=few.losses(stage, student)
        ), student

    # ---- The student before training ----

    def start(self) -> tuple[Any, PreTrainedModel]:
        """Tokenizer and student, made now or before."""
        folder, settings = self.folder / "start", self._start_settings()
        seeded = {**settings, "seed": self.seed}  # what a student with random weights depends on too
        if is_done(folder, settings) or is_done(folder, seeded):
            tokenizer = None if self.task.kind == "image" else AutoTokenizer.from_pretrained(folder)
            return tokenizer or self.processing_class, self._read(folder)
        begin(folder, settings)
        set_seed(self.seed)
        before = torch.get_rng_state()
        tokenizer, student = self._make()
        drawn = not torch.equal(before, torch.get_rng_state())
        student = without_dropout(student).float()  # small steps are lost in half precision
        student.save_pretrained(folder)
        if self.task.kind != "image":
            tokenizer.save_pretrained(folder)
        finish(folder, seeded if drawn else settings)
        return tokenizer, self._read(folder)

    def _read(self, folder: Path) -> PreTrainedModel:
        student = type(self.student or self.teacher).from_pretrained(folder)
        return student if self.student is None else frozen_as(self.student, student)

    def _start_settings(self) -> dict[str, Any]:
        rows = self.train_dataset if self.task.kind == "image" else self.transfer
        return {
            "teacher": model_fingerprint(self.teacher), "limits": self.limits,
            "student": None if self.student is None else model_fingerprint(self.student),
            "data": content_of(rows, self.task.inputs), "vocabulary_size": self.vocabulary_size,
            **({"frozen": names} if self.student is not None and (names := frozen(self.student)) else {}),
        }  # fmt: skip

    def _make(self) -> tuple[Any, PreTrainedModel]:
        if self.student is not None:
            return self.processing_class, copy.deepcopy(self.student)
        sizes = (64, 16) if self.task.kind == "image" else (512, 32)
        calibration = self._calibration(*sizes)
        try:
            return self._cut(calibration)
        except ValueError as error:
            raise ValueError(
                f"{error} Or choose the student yourself, in compress by student=create_student(teacher, "
                "student_config=...)."
            ) from error

    def _cut(self, calibration: list[dict[str, Any]]) -> tuple[Any, PreTrainedModel]:
        """Tokenizer and student. Where the table of words leaves no room for blocks, half of the tokens stay."""
        cut = partial(create_student, self.teacher, calibration=calibration, **self.limits)
        reader = self.processing_class
        if self.task.kind == "image":
            return reader, cut()
        if not getattr(reader, "is_fast", False):
            return reader, cut(processing_class=reader, new_processing_class=reader)
        size, before = self.vocabulary_size or self._vocabulary_size(), None
        while True:
            tokenizer = self._trimmed(size)
            try:
                return tokenizer, cut(processing_class=reader, new_processing_class=tokenizer)
            except NoShapeError:
                if self.vocabulary_size is not None or len(tokenizer) == before:
                    raise
            before, size = len(tokenizer), len(tokenizer) // 2
            print(f"With {before:,} tokens no such student fits; fewer are tried")

    def _calibration(self, number: int, size: int) -> list[dict[str, Any]]:
        """Batches of task rows from all over the dataset, on which to measure what of the teacher is important."""
        rows = range(0, len(self.train_dataset), max(1, len(self.train_dataset) // number))[:number]
        return [self.batch(rows[k : k + size]) for k in range(0, len(rows), size)]

    def _vocabulary_size(self) -> int:
        """How many tokens suit the student's size: as many more as fill the budget where all blocks stay whole."""
        budget = parameter_budget(self.teacher, **self.limits) or 0
        suitable = round(10_000 * (budget / 2.3e6) ** 0.35)
        table = cast(nn.Embedding, self.teacher.get_input_embeddings()).weight
        room = len(table) - math.ceil(max(0, count(self.teacher) - budget) / table.shape[1])
        return min(max(suitable, room), len(self.processing_class))

    def _trimmed(self, size: int) -> Any:
        """The teacher's tokenizer with so many tokens, or as many as must stay."""
        while True:
            try:
                return trim_vocabulary(self.processing_class, self.texts(), size, characters="seen")
            except ValueError:
                if self.vocabulary_size is not None or size >= len(self.processing_class):
                    raise
            size = min(2 * size, len(self.processing_class))

    def _check(self) -> None:
        processes = self.training_arguments.world_size
        if self.training_arguments.n_gpu > 1 or processes > 1:
            raise ValueError(
                f"The recipe runs in one process on one device, but got {processes} processes and "
                f"{self.training_arguments.n_gpu} GPUs in each. Start it once, and show it one GPU: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if self.student is not None:
            require_fit(self.student, self.teacher, self.task, self.limits)
        if not len(self.train_dataset):
            raise ValueError("train_dataset has no rows.")
        for name in ("unlabelled", "exclude") if self.task.kind == "image" else ():
            given = getattr(self, name)
            if not hasattr(given, "__len__") or len(given):
                raise ValueError(
                    f"{name} is for texts and words. Of images, choose the rows of train_dataset, and leave it out."
                )
        if self.task.kind == "image":
            require_image_processor(self.processing_class, self.task)
        else:
            require_tokenizer(self.processing_class, self.teacher)
        if self.glues_words and getattr(self.processing_class, "add_prefix_space", None) is False:
            print(
                "The tokenizer reads lists of words without spaces between them, as pipeline does not. If the teacher "
                "learned from texts, load it with AutoTokenizer.from_pretrained(..., add_prefix_space=True)."
            )
        self.task.labels(self.train_dataset)  # wrong ones are told now, not by the last stage
        for name, least in (("training_rows", 1), ("max_length", 1), ("augmented_rows", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if "num_train_epochs" in (self.arguments or {}):
            raise ValueError(
                "num_train_epochs has no place in `arguments`. Set training_rows, which counts all stages."
            )
        self._check_stages()

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"stages must be one at least, each with a name of its own, got {names} for a task of kind "
                f"{self.task.kind!r}."
            )
        if any(stage.hard_label_weight for stage in self.stages) and self.task.label is None:
            raise ValueError(
                f"No column of {self.train_dataset.column_names} holds labels, which a stage learns from. Name it: "
                "label_column=..., or leave that stage out."
            )
