"""What a student of [`compress`] learns from: the rows, the teacher's answers about them, and what is minimised."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hf_distill.activations import Needs
from hf_distill.losses import DistillationLoss, HardLabelLoss, SoftTargetLoss
from hf_distill.recipes.reading import readable_length, width_of
from hf_distill.recipes.stages import Stage, stages_for
from hf_distill.recipes.states import States
from hf_distill.students.budget import count, parameter_budget
from hf_distill.tasks import Task
from hf_distill.teachers.loading import has_fast_bf16
from hf_distill.training_args import DistillationTrainingArguments
from hf_distill.transfer.build import MOST_ROWS, ROWS_EACH, build_transfer_set, without_rows
from hf_distill.transfer.judged import JudgedRows, Judgement, judge
from hf_distill.transfer.places import places
from hf_distill.transfer.views import ImageRows

# Batches of like lengths; older releases call it otherwise.
_NEW = "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
LIKE_LENGTHS: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if _NEW else {"group_by_length": True}
# What a student sees where nothing is said: so many rows, and of long texts no more than so many tokens (of film
# reviews the rows are 20 million), since time grows with the tokens. A student more than TIMES times smaller than its
# teacher, whose steps cost less, sees more: MORE times as much for each factor of ten, up to MOST_TIMES times.
TRAINING_ROWS, TRAINING_TOKENS = 800_000, 40_000_000
TIMES, MOST_TIMES, MORE = 10, 100, 2.5
NEW_ROWS = 0.3  # at most for each row that is seen: of more, many would never be read
# The teacher judges no more rows than this many times what a stage sees: of a million texts most would never be read.
JUDGED = 2


@dataclass
class Material:
    """What [`compress`] was asked for, and what the student learns from."""

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
    augment: Sequence[str] | None = None
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
        self.stages = stages_for(self.task.kind, self.stages)
        if self.task.kind != "image":
            self.exclude = list(self.exclude) if isinstance(self.exclude, Iterator) else self.exclude  # read twice
            rows = self.train_dataset.with_format(None)
            self.train_dataset = without_rows(rows, self.task.inputs, self.exclude)
            if len(rows) and not len(self.train_dataset):
                raise ValueError(
                    f"All {len(rows):,} training rows are among those that must not be learnt from, such as the texts "
                    "of validation and test. Choose other rows for one of them."
                )
        models = [self.teacher, *filter(None, [self.student])]
        self.length = None if self.task.kind == "image" else readable_length(self.max_length or 512, *models)
        self.limits: dict[str, Any] = {
            "compression": self.compression, "max_parameters": self.max_parameters, "max_mb": self.max_mb,
        }  # fmt: skip
        if self.student is None and not any(value is not None for value in self.limits.values()):
            self.limits["compression"] = 10.0
        parameter_budget(self.teacher, **self.limits)
        # Of the student, which is trained and kept in 4 bytes a number.
        if self.max_mb is not None and self.student is None:
            self.limits |= {"max_mb": None, "max_parameters": int(self.max_mb * 1e6 / 4)}
        like_lengths = {} if self.task.kind == "image" else LIKE_LENGTHS
        self.stage_arguments = {**like_lengths, **(self.arguments or {})}

    @cached_property
    def transfer(self) -> Dataset:
        """The transfer set, without labels."""
        return build_transfer_set(
            self.train_dataset, self.task.inputs, unlabelled=self.unlabelled, exclude=self.exclude,
            augmented_rows=self.new_rows, augment=self.augment, masked_lm=self.masked_lm,
            masked_lm_processing_class=self.masked_lm_processing_class, teacher=self.teacher,
            processing_class=self.processing_class, cache_dir=self.answers / "texts",
        )  # fmt: skip

    @property
    def new_rows(self) -> int:
        """How many texts to make: fewer where fewer rows are seen."""
        most = min(MOST_ROWS, round(NEW_ROWS * self.rows_to_see))
        return min(ROWS_EACH * len(self.train_dataset), most) if self.augmented_rows is None else self.augmented_rows

    def texts(self) -> Iterable[str]:
        """All that is read, text by text; of words each alone, where a tokenizer reads them so."""
        for name in self.task.inputs:
            for text in self.transfer[name]:
                if isinstance(text, str):
                    yield text
                elif self.glues_words:
                    yield from text
                else:
                    yield " ".join(text)

    @cached_property
    def glues_words(self) -> bool:
        """Whether the tokenizer reads a list of words without the spaces between them, other than `pipeline` does."""
        if self.task.kind != "words":
            return False
        rows = [[str(word) for word in row] for row in self.train_dataset[:64][self.task.inputs[0]]]
        apart = self.processing_class(rows, is_split_into_words=True)["input_ids"]
        return apart != self.processing_class([" ".join(row) for row in rows])["input_ids"]

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
        rows: float = TRAINING_ROWS
        if self.task.kind != "image":
            rows = min(rows, max(1.0, TRAINING_TOKENS / self.mean_length))
        return round(rows * MORE ** math.log10(min(max(self.times_smaller, TIMES), MOST_TIMES) / TIMES))

    @property
    def times_smaller(self) -> float:
        """How many times fewer parameters the student has than the teacher, as asked for."""
        if self.limits["compression"] is not None:
            return float(self.limits["compression"])
        if self.student is not None:
            return count(self.teacher) / count(self.student)
        return count(self.teacher) / (parameter_budget(self.teacher, **self.limits) or count(self.teacher))

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a task row, by a thousand of them."""
        every = max(1, len(self.train_dataset) // 1000)
        some = self.train_dataset.select(range(0, len(self.train_dataset), every))
        lengths = [len(ids) for ids in self.encoded(some, self.processing_class, labels=False)["input_ids"]]
        return float(np.mean(lengths))

    def rows(self, stage: Stage, tokenizer: Any) -> JudgedRows:
        """What a stage learns from: the student's encoding and the teacher's answers."""
        task_rows = stage.data == "task"
        if self.task.kind == "image":
            plain = ImageRows(self.task, self.train_dataset, self.processing_class)
            images = self.drawn(plain if task_rows else self.views, stage.data)
            judgement = self.judged(images)
            return JudgedRows(images, judgement, self.confident(judgement, task_rows))
        data = self.drawn(self.train_dataset if task_rows else self.transfer, stage.data)
        judgement = self.judged(self.encoded(data, self.processing_class, labels=False))
        where = None
        if self.task.kind == "words" or (self.states.layers and self.states.positions == "all"):
            where = places(self.task, data, tokenizer, self.processing_class, self.length)
        chosen = self.confident(judgement, task_rows)
        return JudgedRows(
            self.encoded(data, tokenizer, task_rows and self.task.label is not None), judgement, chosen, where
        )

    def encoded(self, data: Dataset, reader: Any, labels: bool) -> Dataset:
        """Rows of texts or words as one of the two models reads them."""
        columns = list(self.task.inputs) + [self.task.label] * labels
        return self.task.encode(data.select_columns(columns), reader, self.length)

    def transfer_rows(self) -> Any:
        """What the teacher is asked about of the transfer set, as it reads it."""
        if self.task.kind == "image":
            return self.drawn(self.views, "transfer")
        return self.encoded(self.drawn(self.transfer, "transfer"), self.processing_class, labels=False)

    def drawn(self, rows: Any, part: str) -> Any:
        """Rows of the task or of the transfer set; of many more than are seen some, the same for every seed."""
        most = self.most_judged(part)
        if len(rows) <= most:
            return rows
        chosen = sorted(random.Random(0).sample(range(len(rows)), most))
        return rows.select(chosen) if isinstance(rows, Dataset) else torch.utils.data.Subset(rows, chosen)

    def most_judged(self, part: str) -> int:
        """How many rows the teacher is asked about at most, for the stages that read this part."""
        seen = [stage.share * self.rows_to_see for stage in self.stages if stage.data == part]
        return max(1, round(JUDGED * max(seen, default=0)))

    def judged(self, rows: Any) -> Judgement:
        """What the teacher says about rows, asked once."""
        return judge(
            rows, self.teacher, self.task.collator(self.processing_class), self.needs, self.answers,
            state_positions=self.states.positions, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def confident(self, judgement: Judgement, task_rows: bool) -> Sequence[int] | None:
        """The rows to learn from, where the teacher's confidence decides."""
        if task_rows or not self.min_confidence:
            return None
        chosen = np.flatnonzero(judgement.confidence(self.task.several) >= self.min_confidence)
        if not len(chosen):
            raise ValueError(f"The teacher is nowhere as confident as min_confidence={self.min_confidence}. Lower it.")
        print(f"Transfer set: {len(chosen):,} of {len(judgement.positions):,} rows are confident enough")
        return chosen.tolist()

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the teacher computes in: bf16 where that is fast, and the model can (DeBERTa's attention cannot)."""
        if not has_fast_bf16(self.device or self.teacher.device):
            return torch.float32
        rows = {name: value.to(self.teacher.device) for name, value in self.batch(range(1)).items()}
        try:
            with torch.no_grad(), torch.autocast(self.teacher.device.type, torch.bfloat16):
                self.teacher.eval()(**rows)
        except RuntimeError as error:
            print(f"The teacher is asked in float32, since it does not compute in bf16: {error}")
            return torch.float32
        return torch.bfloat16

    @cached_property
    def device(self) -> torch.device | None:
        """Where the teacher is asked: where the student is trained, or where it is if that is no CPU."""
        if self.teacher.device.type != "cpu":
            return None
        return self.training_arguments.device

    @cached_property
    def training_arguments(self) -> TrainingArguments:
        """Those of every stage, for what they say of the machine."""
        return DistillationTrainingArguments(
            **{"output_dir": str(self.folder), "report_to": "none", **self.stage_arguments}
        )

    @property
    def needs(self) -> Needs:
        """What the teacher is asked for: logits, and the states to learn."""
        return Needs(logits=True, hidden_states=self.states.layers)

    @cached_property
    def states(self) -> States:
        """Which of the teacher's states a student learns."""
        if not any(stage.representation_weight for stage in self.stages):
            return States()
        number = len(self.train_dataset)
        some = self.batch(range(0, number, max(1, number // 8)))  # from all over it: the first may be empty texts
        size = 0.0 if self.task.kind == "image" else self.states_bytes
        return States.of(self.teacher, self.student, self.task, some, size)

    @property
    def states_bytes(self) -> float:
        """What the final states of all tokens take on disk."""
        rows = min(len(self.transfer), self.most_judged("transfer"))
        return 2 * self.mean_length * rows * (width_of(self.teacher) or 0)

    def losses(self, stage: Stage, student: PreTrainedModel) -> dict[str, DistillationLoss]:
        """What a stage minimises."""
        losses: dict[str, DistillationLoss] = {}
        if stage.soft_target_weight:
            losses["soft"] = SoftTargetLoss(stage.temperature, weight=stage.soft_target_weight)
        if stage.hard_label_weight:
            losses["hard"] = HardLabelLoss(stage.hard_label_weight)
        if stage.representation_weight and self.states.layers:
            losses["representation"] = self.states.loss(stage.representation_weight, student)
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
