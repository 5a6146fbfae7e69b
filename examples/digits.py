"""Distil an image classifier: nothing in hf_distill is tied to text. Less than a minute on a CPU.

    pip install scikit-learn
    python examples/digits.py

A small vision transformer learns scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels):
the teacher. A student some ten times smaller learns from its answers, its hidden states and the
labels; the same student, from the same weights and for as many steps, from the labels alone.

A demonstration, not a benchmark: there is no validation split, batch size, learning rates and the
teacher's epochs were changed once, for speed, after the test accuracies of earlier settings had been
seen, and one seed says little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from _results import Result, complete_card, table, write_card
from _training import train
from datasets import Dataset, DatasetDict
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, set_seed
from transformers import ViTForImageClassification as ViT

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.reports.card_facts import facts_of
from hf_distill.reports.measure import count_parameters, measure_latency

TEACHER = {"layers": 4, "hidden_size": 64, "learning_rate": 3e-3, "epochs": 15}
STUDENT = {"layers": 2, "hidden_size": 24}
STUDENT_EPOCHS, STUDENT_LEARNING_RATE = 20, 5e-3
DISTILLED = "distilled student"
TRAIN_ROWS, BATCH_SIZE = 1000, 64


def digits() -> DatasetDict:
    """The digits as columns that a vision model takes: `pixel_values` (1, 8, 8) and `labels`."""
    bunch = load_digits()
    pixels = (bunch.images / 8 - 1).astype(np.float32)[:, None]  # 0..16 -> -1..1; one channel
    order = np.random.default_rng(0).permutation(len(pixels))
    rows = Dataset.from_dict({"pixel_values": pixels[order], "labels": bunch.target[order]})
    rows = rows.with_format("torch")
    train = rows.select(range(TRAIN_ROWS))
    return DatasetDict(train=train, test=rows.select(range(TRAIN_ROWS, len(rows))))


def vision_transformer(layers: int, hidden_size: int, seed: int, **_: Any) -> ViT:
    """A classifier of 8 x 8 images in 16 patches, with random weights."""
    set_seed(seed)
    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        id2label=dict(enumerate(names)),
        label2id={name: digit for digit, name in enumerate(names)},
    )
    return ViT(config)


def settings(folder: str, epochs: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """The arguments that all three runs share. No choice is made among epochs, so none is saved."""
    return {
        "output_dir": folder,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 256,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,  # bars although the log level is above warnings
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


def answers(trainer: Trainer, data: Dataset) -> np.ndarray:
    """The classes that a trained model answers with."""
    return np.asarray(trainer.predict(data).predictions).argmax(-1)


def describe(name: str, model: ViT, data: Dataset) -> Result:
    """A line of the table with what can be measured without an answer."""
    images = [{"pixel_values": data[row]["pixel_values"][None]} for row in range(20)]
    latency = measure_latency(model.cpu(), images)
    return Result(name, [], parameters=count_parameters(model), latency_ms=latency.p50_ms)


def save(trainer: DistillationTrainer, folder: Path) -> None:
    """The student and its card, as far as the trainer knows it."""
    trainer.save_model(str(folder))
    data = "scikit-learn's handwritten digits"
    facts = facts_of(trainer, model_name="Digits, 2 x 24 vision transformer", dataset=data)
    teacher = "the 4 x 64 vision transformer of the same script"
    facts.teachers = [replace(source, name=teacher) for source in facts.teachers]
    write_card(folder, facts)


def finish_card(folder: Path, lines: list[Result], seeds: int) -> None:
    """The card with the table, and what the trainer does not know."""
    notes = (
        f"{1797 - TRAIN_ROWS} test images. Retention is accuracy divided by the teacher's, agreement the share of "
        "answers that are the teacher's; ms is the median forward pass at batch 1 on one CPU thread. Both students "
        f"started from the same random weights and had the same number of steps; seeds: {seeds}."
    )
    complete_card(
        folder, lines, notes,
        description="A vision transformer that reads handwritten digits of 8 x 8 pixels, trained from random weights "
        "by `examples/digits.py` of hf_distill. Its teacher is one of 4 layers x 64, trained by the same script.",
        limits="A demonstration: there is no validation split, and batch size and learning rates were chosen after "
        "test accuracies of earlier settings had been seen.",
    )  # fmt: skip


def students(teacher: ViT, data: DatasetDict, right: np.ndarray, seeds: int, folder: str) -> list[Result]:
    """The lines of the student with and without a teacher; the first distilled one is saved in `folder/student`."""
    losses: dict[str, dict[str, Any]] = {
        DISTILLED: {"temperature": 4.0, "hidden_state_weight": 0.1},
        "same student, no teacher": {"soft_target_weight": 0.0, "hard_label_weight": 1.0},
    }
    labels, lines = np.asarray(data["test"]["labels"]), []
    for name, weights in losses.items():
        line = describe(name, vision_transformer(**STUDENT, seed=0), data["test"])
        for seed in range(seeds):
            arguments = settings(folder, STUDENT_EPOCHS, STUDENT_LEARNING_RATE, seed)
            trainer = DistillationTrainer(
                vision_transformer(**STUDENT, seed=seed),
                DistillationTrainingArguments(**arguments, **weights),
                train_dataset=data["train"],
                teacher_model=teacher if "hidden_state_weight" in weights else None,
            )
            train(trainer)
            if name == DISTILLED and seed == 0:
                save(trainer, Path(folder) / "student")
            answer = answers(trainer, data["test"])
            line.accuracy.append(float((answer == labels).mean()))
            line.retention.append(line.accuracy[-1] / float((right == labels).mean()))
            line.agreement.append(float((answer == right).mean()))
        lines.append(line)
    return lines


def main() -> None:
    """Train the teacher, then both students for every seed; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many times students are trained")
    parser.add_argument("--output_dir", help="where the first distilled student and its card go")
    given = parser.parse_args()
    seeds = given.seeds
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start, data = time.perf_counter(), digits()
    labels = np.asarray(data["test"]["labels"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.output_dir or scratch
        arguments = settings(folder, TEACHER["epochs"], TEACHER["learning_rate"], seed=0)
        teacher = vision_transformer(**TEACHER, seed=0)
        trainer = Trainer(teacher, TrainingArguments(**arguments), train_dataset=data["train"])
        train(trainer)
        right = answers(trainer, data["test"])
        lines = [describe("teacher", teacher, data["test"])]
        lines[0].accuracy.append(float((right == labels).mean()))
        print(f"[{time.perf_counter() - start:5.1f} s] teacher trained", flush=True)
        lines += students(teacher, data, right, seeds, folder)
        finish_card(Path(folder) / "student", lines, seeds)
    print(f"[{time.perf_counter() - start:5.1f} s] students trained\n\n{table(lines)}")


if __name__ == "__main__":
    main()
