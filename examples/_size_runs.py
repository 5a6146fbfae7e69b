"""The students of `size_vs_retention.py`: the recipe's, and those that learn from labels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _size_options import Start
from transformers import PreTrainedModel, set_seed

from hf_distill.metrics.scores import accuracy
from hf_distill.recipes import STAGES, Compressed, compress, train_on_labels
from hf_distill.recipes.reading import rate_for
from hf_distill.recipes.stages import content_of, fingerprint_of, made_by, stages_for
from hf_distill.transfer import ImageRows
from hf_distill.transfer.build import without_rows

RECIPE, CARRIED, RANDOM = "recipe", "(a) same start, labels only", "(b) random start, labels only"
Answers = dict[str, np.ndarray]  # by split, and the number of `parameters`


@dataclass
class Runs:
    """The runs of one size.

    Attributes:
        start: Teacher and rows.
        compression: How many times smaller.
    """

    start: Start
    compression: float

    def __post_init__(self) -> None:
        self.rates = [float(rate) for rate in self.start.job.learning_rates.split(",")]
        self.chosen: dict[str, float] = {}  # the learning rate of each baseline, found with seed 0
        self.arguments = {"per_device_train_batch_size": self.start.job.batch_size}
        task, self.data = self.start.task, dict(self.start.data)
        if task.kind != "image":  # as the recipe does: nothing held out is learnt from
            self.data["train"] = without_rows(self.data["train"], task.inputs, self.start.exclude())
        columns = [*task.inputs, str(task.label)]
        self.content: dict[str, Any] = {name: content_of(part, columns) for name, part in self.data.items()}
        if self.start.held_out is not None:
            self.content["held_out"] = content_of(self.start.held_out, self.start.task.inputs)

    def run(self, seed: int) -> dict[str, Answers]:
        """The answers of each student with this seed; seeds are run in order, from 0."""
        job = self.start.job
        folder = Path(job.output_dir) / f"{self.compression:g}x-seed{seed}"
        made = compress(
            self.start.teacher, self.start.reader, self.start.data["train"], folder, compression=self.compression,
            unlabelled=self.start.unlabelled if self.start.unlabelled is not None else (),
            exclude=self.start.exclude(), augmented_rows=job.augmented_rows, training_rows=job.training_rows,
            input_columns=self.start.task.inputs, label_column=self.start.task.label, max_length=job.max_length,
            seed=seed, answers_dir=Path(job.output_dir) / "answers", arguments=self.arguments,
        )  # fmt: skip
        last = stages_for(self.start.task.kind, STAGES)[-1].name
        results = {RECIPE: self._kept(folder, {"made": made_by(folder / last)}, made, lambda: made.student)}
        for name in (CARRIED, RANDOM) if job.baselines else ():
            results[name] = self.baseline(name, made, folder, seed)
        return results

    def baseline(self, name: str, made: Compressed, folder: Path, seed: int) -> Answers:
        """A baseline's answers, at the learning rate that is best on validation rows with the first seed."""
        rates = self.rates if name not in self.chosen else [self.chosen[name]]
        found = {rate: self.with_labels_alone(name, rate, made, folder, seed) for rate in rates}
        truth = self.start.labels("validation")
        self.chosen[name] = max(rates, key=lambda rate: accuracy(found[rate]["validation"], truth))
        return found[self.chosen[name]]

    def with_labels_alone(self, name: str, rate: float, made: Compressed, folder: Path, seed: int) -> Answers:
        """The answers of a baseline: of its best epoch on validation rows. Narrow students learn as fast as the
        recipe's.
        """
        job, rate = self.start.job, rate_for(made.student, rate)
        settings = {
            "name": name, "start": made_by(folder / "start"), "training_rows": made.training_rows,
            "learning_rate": rate, "arguments": self.arguments, "seed": seed, "max_length": job.max_length,
        }  # fmt: skip

        def trained() -> PreTrainedModel:
            student = type(made.student).from_pretrained(folder / "start")
            if name == RANDOM:
                set_seed(seed)
                student = type(student)(student.config)
            return train_on_labels(
                student, self._rows("train", made), self._rows("validation", made), folder=folder / "labels",
                settings={**settings, "data": self.content}, training_rows=made.training_rows, learning_rate=rate,
                data_collator=self.start.task.collator(made.processing_class), arguments=self.arguments, seed=seed,
            )  # fmt: skip

        return self._kept(folder, settings, made, trained)

    def _kept(
        self, folder: Path, settings: Mapping[str, Any], made: Compressed, model: Callable[[], PreTrainedModel]
    ) -> Answers:
        """A model's answers, made now or read: other settings or rows, other answers."""
        file = folder / f"answers-{fingerprint_of({**settings, 'data': self.content})}.npz"
        if not file.is_file():
            student = model()
            found = self.start.answers(student, made.processing_class)
            found["parameters"] = np.array(student.num_parameters())
            unfinished = file.with_suffix(".unfinished.npz")
            np.savez(unfinished, **found)
            unfinished.replace(file)
        return dict(np.load(file))

    def _rows(self, split: str, made: Compressed) -> Any:
        """Labelled rows as the student reads them."""
        part, task = self.data[split], self.start.task
        if task.kind == "image":
            return ImageRows(task, part, made.processing_class)
        return task.encode(part, made.processing_class, self.start.job.max_length)
