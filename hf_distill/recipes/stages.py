"""One stage after another, each resumable: what is finished is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from hf_distill.losses import DistillationLoss
from hf_distill.recipes.embeddings import plain_embedding
from hf_distill.recipes.reading import rate_for
from hf_distill.reports.card_facts import facts_of
from hf_distill.tasks import KINDS, Kind
from hf_distill.trainer import DistillationTrainer
from hf_distill.training_args import DistillationTrainingArguments

DONE = "done.json"
# Arguments that change no number: nothing is trained anew for them.
_WITHOUT_EFFECT = {
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "disable_tqdm", "log_level", "logging_dir", "logging_first_step", "logging_steps", "logging_strategy",
    "per_device_eval_batch_size", "report_to", "run_name", "save_steps", "save_strategy", "save_total_limit",
}  # fmt: skip
CARD, LOG = "card.json", "log.json"  # what a model card says of the training, and what was logged


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        name: Its folder.
        data: `"transfer"` (everything that the teacher has judged, without labels) or `"task"` (the rows of the task,
            as they are and with their labels).
        share: Which share of all training rows it sees.
        learning_rate: Its highest; it rises over the first 6 % of the steps and falls linearly to 0.
        learning_rate_width: The width of a student for which that is right; for others it is scaled by [`rate_for`].
            By default the rate is the same for every student.
        representation_weight: Weight of the distance between states: of all tokens' final ones where the answer is
            about words; of all tokens' final ones and those in the middle, each 16 times as much, where there is one
            answer for a whole text; of what the heads read alone, of images and where a text's states would take too
            much of the disk.
        soft_target_weight: Weight of the soft targets.
        hard_label_weight: Weight of the labels.
        temperature: Of the soft targets.
        kinds: For which kinds of task it is; the other stages of a task of another kind share its rows.
    """

    name: str
    data: Literal["transfer", "task"]
    share: float
    learning_rate: float
    representation_weight: float = 0.0
    soft_target_weight: float = 1.0
    hard_label_weight: float = 0.0
    temperature: float = 2.0
    learning_rate_width: int | None = None
    kinds: tuple[Kind, ...] = KINDS

    def learning_rate_of(self, student: PreTrainedModel) -> float:
        """The highest learning rate for a student of this width."""
        if self.learning_rate_width is None:
            return self.learning_rate
        return rate_for(student, self.learning_rate, self.learning_rate_width)


def stages_for(kind: str, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of a task of this kind, which see as many rows as all of them would.

    >>> both = Stage("first", "transfer", 0.75, 1e-3), Stage("second", "task", 0.25, 1e-3, kinds=("image",))
    >>> [stage.share for stage in stages_for("image", both)], [stage.share for stage in stages_for("text", both)]
    ([0.75, 0.25], [1.0])
    """
    kept = [stage for stage in stages if kind in stage.kinds]
    if len(kept) == len(stages):
        return tuple(stages)
    more = sum(stage.share for stage in stages) / (sum(stage.share for stage in kept) or 1.0)
    return tuple(replace(stage, share=more * stage.share) for stage in kept)


def fingerprint_of(content: Any) -> str:
    """Changes with anything that JSON can say of it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def with_effect(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments on which a result depends."""
    return {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}


def content_of(dataset: Dataset, columns: Sequence[str]) -> str:
    """Changes with anything in these columns, and not with how the dataset came to be."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(1000):
        digest.update(json.dumps(batch.to_pydict(), default=repr).encode())
    return digest.hexdigest()[:16]


def is_done(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a stage was finished with these very settings."""
    try:
        return bool(json.loads((folder / DONE).read_text())["fingerprint"] == fingerprint_of(settings))
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return False


def made_by(folder: Path) -> str:
    """What identifies the settings with which a folder was finished."""
    return str(json.loads((folder / DONE).read_text())["fingerprint"])


def finish(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say so; the last thing that is written."""
    unfinished = folder / f"{DONE}.unfinished"
    unfinished.write_text(
        json.dumps({"fingerprint": fingerprint_of(settings), **settings}, indent=2, default=str) + "\n"
    )
    os.replace(unfinished, folder / DONE)


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder ready: what another run with other settings left is removed, checkpoints of this one stay.

    Raises:
        ValueError: If something else is in the folder.
    """
    started = folder / "started.json"
    if folder.exists() and not started.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else, which would be lost. Choose another place, or remove it.")
    same = started.is_file() and started.read_text() == fingerprint_of(settings)
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started.write_text(fingerprint_of(settings))
    (folder / DONE).unlink(missing_ok=True)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; those that a full disk or a kill cut off are removed.

    Trainer writes its state last.
    """
    while (found := get_last_checkpoint(str(folder))) is not None:
        try:
            json.loads((Path(found) / TRAINER_STATE_NAME).read_text())
            return found
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(found)
    return None


class _Bars(ProgressCallback):
    """Trainer's progress bars without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


def show_bars_only(trainer: Trainer) -> None:
    """Progress bars, unless `disable_tqdm`, and no line for each log."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(_Bars)


def frozen(model: PreTrainedModel) -> list[str]:
    """The parameters that do not learn."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def frozen_as(before: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """A model read from a folder, which does not say what must not learn, with the parameters fixed that were."""
    for name in frozen(before):
        model.get_parameter(name).requires_grad_(False)
    return model


def run_stage(
    stage: Stage,
    student: PreTrainedModel,
    rows: Callable[[], Any],
    losses: Mapping[str, DistillationLoss],
    *,
    folder: Path,
    settings: Mapping[str, Any],
    training_rows: int,
    arguments: Mapping[str, Any],
    data_collator: Any,
    seed: int,
    prepare: Callable[[PreTrainedModel], PreTrainedModel] = lambda student: student,
) -> PreTrainedModel:
    """Train a stage, or go on where it was interrupted, or open what it made.

    Args:
        stage: What to do.
        student: The student as the stage before left it.
        rows: Makes what it learns from, if it is needed.
        losses: What it minimises.
        folder: Where its checkpoints and at the end its model are.
        settings: All that its result depends on; a change starts it anew.
        training_rows: How many rows it sees.
        arguments: More fields of `TrainingArguments`.
        data_collator: What makes a batch.
        seed: Of the order of the rows and the dropout.
        prepare: What is done to the student before training, such as [`map_embedding`].
    """
    if is_done(folder, settings):
        return frozen_as(student, type(student).from_pretrained(folder / "model", dtype=student.dtype))
    begin(folder, settings)
    given = dict(arguments)
    batch = given.setdefault("per_device_train_batch_size", 32) * given.get("gradient_accumulation_steps", 1)
    steps = max(1, training_rows // batch)
    args = DistillationTrainingArguments(**{
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": stage.learning_rate_of(student),
        "warmup_steps": 0.06,  # below 1 a share of all steps
        "weight_decay": 0.01,
        "save_strategy": "steps",
        "save_steps": max(1, steps // 10),
        "save_total_limit": 1,
        "logging_steps": max(1, steps // 20),
        "report_to": "none",
        "disable_tqdm": False,
        "seed": seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **given,
    })  # fmt: skip
    set_seed(seed)
    trainer = DistillationTrainer(prepare(student), args, data_collator, rows(), losses=dict(losses))
    show_bars_only(trainer)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    student = plain_embedding(trainer.model)
    student.save_pretrained(folder / "model")
    (folder / CARD).write_text(json.dumps(facts_of(trainer).to_dict(), default=str))
    (folder / LOG).write_text(json.dumps(trainer.state.log_history))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finish(folder, settings)
    return student
