"""Teacher and students of `movie_sentences.py`: how they are trained, asked and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sentence_job import Job
from _training import accuracy, precision, train
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_distill import DistillationTrainer, DistillationTrainingArguments, cache_teacher_outputs

SETTINGS_FILE = "job_settings.json"


def training_settings(folder: Path, epochs: float, learning_rate: float, **other: Any) -> dict[str, Any]:
    """Arguments that the students share, with each other and (but for the epochs) with the teacher: batches of like
    lengths, the best epoch wins.
    """
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,  # below 1 a share of all steps
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_only_model": True,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,  # bars although the log level is above warnings
        "dataloader_pin_memory": torch.cuda.is_available(),
        **other,
    }


def fingerprint(data: DatasetDict) -> str:
    """Changes when any text, label, or their order does."""
    rows = {name: [part["text"][:], part["label"][:]] for name, part in data.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def stored_teacher(folder: Path, settings: dict[str, Any]) -> PreTrainedModel | None:
    """The teacher of an earlier run, if it was made with these very settings."""
    file = folder / SETTINGS_FILE
    if not file.is_file() or json.loads(file.read_text()) != settings:
        return None
    return AutoModelForSequenceClassification.from_pretrained(folder)


def store_teacher(
    folder: Path,
    settings: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Save beside the final place and rename: an interrupted run leaves no half a teacher."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def fine_tune_teacher(
    name: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, job: Job, folder: Path, bf16: bool
) -> tuple[PreTrainedModel, list[float]]:
    """A pretrained encoder with a classification head, and its validation accuracies where it left those rows out.

    With `teacher_epochs=0` the model is taken as it is; its classes must then be the data's.
    """
    names = data["train"].features["label"].names
    if job.teacher_epochs == 0:
        model = AutoModelForSequenceClassification.from_pretrained(name)
        classes = [str(model.config.id2label[i]).lower() for i in range(model.config.num_labels)]
        generic = [f"label_{i}" for i in range(len(names))]
        if classes not in ([label.lower() for label in names], generic):
            raise SystemExit(f"The teacher's classes {classes} are not the data's, {names}, in order.")
        return model, []
    set_seed(0)  # the head is new
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={label: i for i, label in enumerate(names)},
        ignore_mismatched_sizes=True,  # a head for other classes is replaced
    )
    arguments = training_settings(
        folder, job.teacher_epochs, job.teacher_learning_rate,
        per_device_train_batch_size=job.batch_size, seed=job.teacher_seed, **precision(bf16),
    ) | {
        "train_sampling_strategy": "random",  # better than like lengths by a point; without padding as fast
        "eval_strategy": "no" if job.teacher_refit else "epoch",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }  # fmt: skip
    rows = concatenate_datasets([data["train"], data["validation"]]) if job.teacher_refit else data["train"]
    trainer = DistillationTrainer(  # on labels alone it is Trainer, which computes no padding
        model,
        DistillationTrainingArguments(**arguments, soft_target_weight=0.0, hard_label_weight=1.0),
        train_dataset=rows,
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    return model, train(trainer)


def answers(
    model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase, bf16: bool = False
) -> torch.Tensor:
    """Logits of all rows (N, V), in the rows' order."""
    # Sorted by length there is hardly any padding to compute. `group_by_length` would do the same,
    # but predict() would then return the rows in the sampler's order.
    lengths = [len(ids) for ids in data["input_ids"]]
    order = np.argsort(lengths, kind="stable")[::-1]
    columns = [c for c in data.column_names if c not in ("text", "label", "teacher_logits")]
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            unused,
            per_device_eval_batch_size=64,
            report_to="none",
            disable_tqdm=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            **precision(bf16),
        )
        trainer = Trainer(model, arguments, processing_class=tokenizer)
        prediction = trainer.predict(data.select_columns(columns).select(order.tolist()))
    logits = np.empty_like(prediction.predictions, dtype=np.float32)
    logits[order] = prediction.predictions
    return torch.from_numpy(logits)


def with_teacher_logits(
    data: DatasetDict, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, bf16: bool
) -> DatasetDict:
    """Every split with the column `teacher_logits`; the teacher is asked about what `folder` does not know yet."""

    def asked(part: Dataset) -> Dataset:
        columns = [c for c in part.column_names if c in tokenizer.model_input_names]
        answered = cache_teacher_outputs(
            part.select_columns(columns),
            teacher,
            data_collator=DataCollatorWithPadding(tokenizer),
            cache_dir=folder,
            batch_size=64,
            dtype="bfloat16" if bf16 else "float32",
        )
        return part.add_column("teacher_logits", answered["teacher_logits"][:])

    return DatasetDict({split: asked(part) for split, part in data.items()})


@dataclass
class Lesson:
    """All that a student learns from; every split of the data has `teacher_logits`."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DatasetDict


def new_student(job: Job, lesson: Lesson, seed: int) -> PreTrainedModel:
    """A small BERT on the teacher's vocabulary and classes, with random weights."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=lesson.teacher.config.vocab_size,
        hidden_size=job.student_hidden_size,
        num_hidden_layers=job.student_layers,
        num_attention_heads=job.student_heads,
        intermediate_size=4 * job.student_hidden_size,
        max_position_embeddings=job.max_length,
        pad_token_id=lesson.tokenizer.pad_token_id,
        id2label=lesson.teacher.config.id2label,
        label2id=lesson.teacher.config.label2id,
    )
    return BertForSequenceClassification(config)


def train_student(
    job: Job, lesson: Lesson, seed: int, folder: Path, *, learning_rate: float, **losses: float
) -> tuple[DistillationTrainer, list[float]]:
    """One student from the random weights of `seed`; its trainer and validation accuracies.

    The teacher's answers are a column of the data, so the trainer needs no teacher. With
    `soft_target_weight=0` it learns from the labels alone: the same code is its own baseline.
    """
    arguments = training_settings(
        folder,
        job.student_epochs,
        learning_rate,
        seed=seed,
        per_device_train_batch_size=job.batch_size,
        **losses,
    )
    trainer = DistillationTrainer(
        new_student(job, lesson, seed),
        DistillationTrainingArguments(**arguments),
        train_dataset=lesson.data["train"],
        eval_dataset=lesson.data["validation"],
        processing_class=lesson.tokenizer,
        compute_metrics=accuracy,
    )
    return trainer, train(trainer)
