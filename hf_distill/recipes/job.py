"""How [`compress`] makes each part: the student before training, what it learns from, what it minimises."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed

from hf_distill.activations import Needs
from hf_distill.losses import DistillationLoss, HardLabelLoss, HiddenStateLoss, SoftTargetLoss
from hf_distill.recipes.reading import (
    has_readable_states,
    number_of_layers,
    readable_length,
    require_fit,
    without_dropout,
)
from hf_distill.recipes.stages import Stage, begin, content_of, fingerprint_of, finish, is_done, run_stage
from hf_distill.students import create_student, trim_vocabulary
from hf_distill.students.budget import parameter_budget
from hf_distill.tasks import Task
from hf_distill.teachers import OnlineTeacher
from hf_distill.teachers.loading import has_fast_bf16
from hf_distill.trainer import DistillationTrainer
from hf_distill.training_args import DistillationTrainingArguments
from hf_distill.transfer.build import AUGMENT, build_transfer_set
from hf_distill.transfer.judged import JudgedRows, Judgement, judge, word_ids
from hf_distill.transfer.views import ImageRows
from hf_distill.writing import alone_in, whole_files

# Batches of like lengths; older releases call it otherwise.
_NEW = "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
LIKE_LENGTHS: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if _NEW else {"group_by_length": True}
# What a student sees where nothing is said: so many rows, and of long texts no more than so many tokens (of film
# reviews the rows are 10 million), since time grows with the tokens.
TRAINING_ROWS, TRAINING_TOKENS = 400_000, 40_000_000


@dataclass
class Compressed:
    """What [`compress`] made.

    Attributes:
        student: The trained student.
        processing_class: What it reads with: a tokenizer with fewer tokens, or the teacher's image processor.
        task: What the data was taken for.
        folder: Where student and processing class are, for `from_pretrained` and `pipeline`.
    """

    student: PreTrainedModel
    processing_class: Any
    task: Task
    folder: Path


@dataclass
class Job:
    """What [`compress`] was asked for, and how each part of it is made."""

    teacher: PreTrainedModel
    processing_class: Any
    train_dataset: Dataset
    output_dir: str | Path
    stages: Sequence[Stage]
    training_rows: int | None = None
    compression: float | None = None
    max_parameters: int | None = None
    max_mb: float | None = None
    student: PreTrainedModel | None = None
    vocabulary_size: int | None = None
    unlabelled: Any = ()
    exclude: Any = ()
    augmented_rows: int | None = None
    augment: Sequence[str] = AUGMENT
    masked_lm: Any = None
    masked_lm_processing_class: Any = None
    input_columns: Sequence[str] | str | None = None
    label_column: str | None = None
    max_length: int | None = None
    min_confidence: float = 0.0
    answers_dir: str | Path | None = None
    arguments: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.folder = Path(self.output_dir)
        self.answers = Path(self.answers_dir or self.folder / "answers")
        self.task = Task.of(self.teacher, self.train_dataset, self.input_columns, self.label_column)
        models = [self.teacher, *filter(None, [self.student])]
        self.length = None if self.task.kind == "image" else readable_length(self.max_length or 512, *models)
        self.limits: dict[str, Any] = {
            "compression": self.compression, "max_parameters": self.max_parameters, "max_mb": self.max_mb,
        }  # fmt: skip
        if self.student is None and not any(value is not None for value in self.limits.values()):
            self.limits["compression"] = 10.0
        like_lengths = {} if self.task.kind == "image" else LIKE_LENGTHS
        self.stage_arguments = {**like_lengths, **(self.arguments or {})}

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
            "training_rows": self.rows_to_see, "arguments": self.stage_arguments, "seed": self.seed,
            "min_confidence": self.min_confidence, "max_length": self.max_length,
        }  # fmt: skip
        collator = self.task.collator(tokenizer)
        for stage in self.stages:
            settings = {"before": fingerprint_of(settings), **settings, "stage": asdict(stage)}
            student = run_stage(
                stage, student, partial(self.rows, stage, tokenizer), self.losses(stage),
                folder=self.folder / stage.name, settings=settings,
                training_rows=round(stage.share * self.rows_to_see),
                arguments=self.stage_arguments,
                data_collator=collator, seed=self.seed,
            )  # fmt: skip
        target = self.folder / "student"
        with whole_files(target) as unfinished:
            student.eval().save_pretrained(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
        return Compressed(student, tokenizer, self.task, target)

    def trial(self, rows: int = 64) -> tuple[DistillationTrainer, PreTrainedModel]:
        """A trainer for the last stage on the first rows alone, and its student: to see that everything fits."""
        tokenizer, student = self.start()
        number = min(rows, len(self.train_dataset))
        few = replace(self, train_dataset=self.train_dataset.select(range(number)))
        args = DistillationTrainingArguments(**{
            "output_dir": str(self.folder / "trial"), "report_to": "none", "per_device_train_batch_size": 8,
            **self.stage_arguments,
        })  # fmt: skip
        stage, collator = self.stages[-1], self.task.collator(tokenizer)
        return DistillationTrainer(
            student, args, collator, few.rows(stage, tokenizer), losses=few.losses(stage)
        ), student

    # ---- The student before training ----

    def start(self) -> tuple[Any, PreTrainedModel]:
        """Tokenizer and student, made now or before."""
        folder, settings = self.folder / "start", self._start_settings()
        seeded = {**settings, "seed": self.seed}  # what a student with random weights depends on too
        if is_done(folder, settings) or is_done(folder, seeded):
            tokenizer = None if self.task.kind == "image" else AutoTokenizer.from_pretrained(folder)
            return tokenizer or self.processing_class, type(self.student or self.teacher).from_pretrained(folder)
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
        return tokenizer, type(student).from_pretrained(folder)

    def _start_settings(self) -> dict[str, Any]:
        rows = self.train_dataset if self.task.kind == "image" else self.transfer
        return {
            "teacher": OnlineTeacher(self.teacher).fingerprint(), "limits": self.limits,
            "student": None if self.student is None else OnlineTeacher(self.student).fingerprint(),
            "data": content_of(rows, self.task.inputs), "vocabulary_size": self.vocabulary_size,
        }  # fmt: skip

    def _make(self) -> tuple[Any, PreTrainedModel]:
        if self.student is not None:
            return self.processing_class, copy.deepcopy(self.student)
        if self.task.kind == "image":
            rows = len(self.train_dataset)
            calibration = [self.batch(range(k, min(k + 16, rows))) for k in range(0, max(min(64, rows - 15), 1), 16)]
            return self.processing_class, create_student(self.teacher, calibration=calibration, **self.limits)
        tokenizer = self.processing_class
        if getattr(tokenizer, "is_fast", False):
            tokenizer = self._trimmed()
        readers = {"processing_class": self.processing_class, "new_processing_class": tokenizer}
        return tokenizer, create_student(self.teacher, **readers, **self.limits)

    def _trimmed(self) -> Any:
        """The teacher's tokenizer with as many tokens as suit the student's size, or as many as must stay."""
        budget = parameter_budget(self.teacher, **self.limits) or 0
        size = self.vocabulary_size or round(10_000 * (budget / 2.3e6) ** 0.35)
        while True:
            try:
                return trim_vocabulary(self.processing_class, self.texts(), size, characters="seen")
            except ValueError:
                if self.vocabulary_size is not None or size >= len(self.processing_class):
                    raise
            size = min(2 * size, len(self.processing_class))

    def texts(self) -> Iterable[str]:
        """All that is read, text by text."""
        for name in self.task.inputs:
            for text in self.transfer[name]:
                yield text if isinstance(text, str) else " ".join(text)

    # ---- What it learns from ----

    @cached_property
    def transfer(self) -> Dataset:
        """The transfer set, without labels."""
        return build_transfer_set(
            self.train_dataset, self.task.inputs, unlabelled=self.unlabelled, exclude=self.exclude,
            augmented_rows=self.augmented_rows, augment=self.augment, masked_lm=self.masked_lm,
            masked_lm_processing_class=self.masked_lm_processing_class, teacher=self.teacher,
            processing_class=self.processing_class,
        )  # fmt: skip

    @cached_property
    def views(self) -> ImageRows:
        """Of images: as they are, then their views."""
        rows = len(self.train_dataset)
        number = min(5 * rows, 200_000) if self.augmented_rows is None else self.augmented_rows
        return ImageRows(self.task, self.train_dataset, self.processing_class, views=1 + -(-number // rows))

    @cached_property
    def rows_to_see(self) -> int:
        """How many rows the student sees in all stages together."""
        if self.training_rows is not None:
            return self.training_rows
        if self.task.kind == "image":
            return TRAINING_ROWS
        every = max(1, len(self.train_dataset) // 1000)
        some = self.train_dataset.select(range(0, len(self.train_dataset), every))
        lengths = [len(ids) for ids in self.encoded(some, self.processing_class, labels=False)["input_ids"]]
        return min(TRAINING_ROWS, max(1, round(TRAINING_TOKENS / np.mean(lengths))))

    def rows(self, stage: Stage, tokenizer: Any) -> JudgedRows:
        """What a stage learns from: the student's encoding and the teacher's answers."""
        labelled = stage.data == "task"
        if self.task.kind == "image":
            plain = ImageRows(self.task, self.train_dataset, self.processing_class)
            images = plain if labelled else self.views
            judgement = self.judged(images)
            return JudgedRows(images, judgement, self.confident(judgement, labelled))
        data = self.train_dataset if labelled else self.transfer
        judgement = self.judged(self.encoded(data, self.processing_class, labels=False))
        words = None
        if self.task.kind == "words":
            judgement.tokens, words = (
                word_ids(self.task, data, reader, self.length) for reader in (self.processing_class, tokenizer)
            )
        chosen = self.confident(judgement, labelled)
        return JudgedRows(self.encoded(data, tokenizer, labelled), judgement, chosen, words)

    def encoded(self, data: Dataset, reader: Any, labels: bool) -> Dataset:
        """Rows of texts or words as one of the two models reads them."""
        columns = list(self.task.inputs) + [self.task.label] * labels
        return self.task.encode(data.select_columns(columns), reader, self.length)

    def transfer_rows(self) -> Any:
        """The transfer set as the teacher reads it."""
        if self.task.kind == "image":
            return self.views
        return self.encoded(self.transfer, self.processing_class, labels=False)

    def judged(self, rows: Any) -> Judgement:
        """What the teacher says about rows, asked once."""
        return judge(
            rows, self.teacher, self.task.collator(self.processing_class), self.needs, self.answers,
            state_positions="all" if self.task.kind == "words" else "first", dtype=self.dtype,
        )  # fmt: skip

    def confident(self, judgement: Judgement, labelled: bool) -> Sequence[int] | None:
        """The rows to learn from, where the teacher's confidence decides."""
        if labelled or not self.min_confidence:
            return None
        chosen = np.flatnonzero(judgement.confidence() >= self.min_confidence)
        if not len(chosen):
            raise ValueError(f"The teacher is nowhere as confident as min_confidence={self.min_confidence}. Lower it.")
        print(f"Transfer set: {len(chosen):,} of {len(judgement.positions):,} rows are confident enough")
        return chosen.tolist()

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the teacher computes in."""
        return torch.bfloat16 if has_fast_bf16(self.teacher.device) else torch.float32

    @cached_property
    def needs(self) -> Needs:
        """What the teacher is asked for: logits, and its final states where they say what the head reads."""
        with_states = any(stage.representation_weight for stage in self.stages) and has_readable_states(
            self.teacher, self.task, self.batch(range(min(4, len(self.train_dataset))))
        )
        last = number_of_layers(self.teacher)
        return Needs(logits=True, hidden_states=(last,) if with_states and last else ())

    def losses(self, stage: Stage) -> dict[str, DistillationLoss]:
        """What a stage minimises."""
        losses: dict[str, DistillationLoss] = {}
        if stage.soft_target_weight:
            losses["soft"] = SoftTargetLoss(stage.temperature, weight=stage.soft_target_weight)
        if stage.hard_label_weight:
            losses["hard"] = HardLabelLoss(stage.hard_label_weight)
        if stage.representation_weight and self.needs.hidden_states:
            positions: Any = "all" if self.task.kind == "words" else "first"
            losses["representation"] = HiddenStateLoss(
                {-1: -1}, "cosine", stage.representation_weight, positions=positions
            )
        return losses

    def batch(self, rows: Iterable[int]) -> dict[str, Any]:
        """Some task rows as the teacher reads them."""
        some = self.train_dataset.select(list(rows))
        if self.task.kind == "image":
            features: list[Any] = [{"pixel_values": row["pixel_values"]}
                                   for row in map(ImageRows(self.task, some, self.processing_class).__getitem__,
                                                  range(len(some)))]  # fmt: skip
        else:
            features = list(self.encoded(some, self.processing_class, labels=False))
        return dict(self.task.collator(self.processing_class)(features))

    def _check(self) -> None:
        if self.student is not None:
            require_fit(self.student, self.teacher, self.task, self.limits)
        if not len(self.train_dataset):
            raise ValueError("train_dataset has no rows.")
        if self.task.kind == "image" and (not hasattr(self.unlabelled, "__len__") or len(self.unlabelled)):
            raise ValueError(
                "unlabelled is for texts and words. Of images, add the rows to train_dataset, or leave it out."
            )
        if self.training_rows is not None and self.training_rows < 1:
            raise ValueError(f"training_rows must be at least 1, got {self.training_rows}.")
        if any(stage.hard_label_weight for stage in self.stages) and self.task.label is None:
            raise ValueError(
                f"No column of {self.train_dataset.column_names} holds labels, which a stage learns from. Name it: "
                "label_column=..., or leave that stage out."
            )
