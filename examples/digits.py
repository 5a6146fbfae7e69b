"""Distil an image classifier: nothing in hf_distill is tied to text. A minute on a CPU.

    pip install scikit-learn
    python examples/digits.py --output_dir out

A small vision transformer learns scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels): the teacher. A
student some ten times smaller learns from its answers and the labels; the same student, from the same weights and for
as many steps, from the labels alone. The distilled student and its card are saved in `out/student`.

`--seeds 3` gave (2026-11-25; mean and standard deviation over the students' seeds, 597 test images):

    model                     accuracy %  retention %  agreement %  parameters
    teacher                         97.2                               136,138
    distilled student         95.8 ± 0.9   98.6 ± 0.9   94.4 ± 0.6      10,594
    same student, no teacher  95.1 ± 1.3   97.9 ± 1.3   93.7 ± 1.1      10,594

The teacher's gain is smaller than the spread, and seed 0 by itself says the contrary (94.8 against 96.5 %). All
settings were chosen by the accuracy on 200 validation images, which `--evaluate_on validation` shows (mean of seeds 0
to 2, the teacher's of 0 and 1; trained by a plain loop that draws other batches than Trainer):

- teacher: 90.2 % after 15 epochs at 3e-3, 96.8 % after 40, there at 1e-3 too (98.5 % with seed 0, which was taken).
  Shifting the images by a pixel made it worse (80.8 % after 40 epochs at 3e-3): a pixel is much on 8 x 8;
- student without a teacher: 89.7 % after 20 epochs at 5e-3, the best of four rates; after 40, 95.2 % at 2.5e-3 and at
  5e-3, 93.8 % at 1e-2, 95.0 % at 2e-2;
- distilled student: 85.7 % after 20 epochs at 5e-3, 89.7 % at 1e-2, so that in few steps this teacher does not help;
  after 40, 94.8 % at 2.5e-3, 96.2 % at 5e-3, 94.8 % at 1e-2, and at 5e-3 94.2 % with temperature 2 instead of 4,
  94.2 % without labels, 95.0 % with hidden states of weight 0.1 beside.

The test images were not looked at while choosing. Earlier settings had been seen on most of them.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _results import Result, complete_card, percent, table, write_card
from _sentence_job import DISTILLED, LABELS_ONLY, Clock
from _training import train
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, set_seed
from transformers import ViTForImageClassification as ViT

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.reports.card_facts import facts_of
from hf_distill.reports.measure import count_parameters, measure_latency
from hf_distill.reports.sources import License

TEACHER = {"layers": 4, "hidden_size": 64, "learning_rate": 1e-3, "epochs": 40}
STUDENT = {"layers": 2, "hidden_size": 24}
STUDENT_EPOCHS, STUDENT_LEARNING_RATE = 40, 5e-3
TRAIN_ROWS, VALIDATION_ROWS, BATCH_SIZE = 1000, 200, 64
LOSSES: dict[str, dict[str, Any]] = {
    DISTILLED: {"learning_rate": STUDENT_LEARNING_RATE, "temperature": 4.0},
    LABELS_ONLY: {"learning_rate": STUDENT_LEARNING_RATE, "soft_target_weight": 0.0, "hard_label_weight": 1.0},
}
# For the cards of all students of these images.
TEACHER_NAME, DATA = "the 4 x 64 vision transformer of the same script", "scikit-learn's handwritten digits"
DESCRIPTION = (
    "A vision transformer that reads handwritten digits, `pixel_values` of shape (batch, 1, 8, 8) from -1 (paper) to "
    "1 (ink). It was trained from random weights by"
)
LIMITS = (
    f"A demonstration: it reads digits that are cut out, centred and scaled to 8 x 8 pixels as its {TRAIN_ROWS:,} "
    "training images are."
)

Rows = list[dict[str, Tensor]]  # `pixel_values` (1, 8, 8) and `labels` ()


def digits() -> dict[str, Rows]:
    """The digits in three splits, as rows that a vision model takes; tensors, since training reads them many times."""
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1  # 0..16 -> -1..1; one channel
    order = np.random.default_rng(0).permutation(len(pixels))
    rows = [{"pixel_values": pixels[row], "labels": torch.tensor(bunch.target[row])} for row in order]
    cut = TRAIN_ROWS + VALIDATION_ROWS
    return {"train": rows[:TRAIN_ROWS], "validation": rows[TRAIN_ROWS:cut], "test": rows[cut:]}


def labels(rows: Rows) -> np.ndarray:
    """The right answers."""
    return np.array([int(row["labels"]) for row in rows])


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


def answers(trainer: Trainer, rows: Rows) -> np.ndarray:
    """The classes that a trained model answers with."""
    return np.asarray(trainer.predict(rows).predictions).argmax(-1)


def describe(name: str, model: ViT, rows: Rows) -> Result:
    """A line of the table with what can be measured without an answer."""
    images = [{"pixel_values": row["pixel_values"][None]} for row in rows[:20]]
    latency = measure_latency(model.cpu(), images)
    return Result(name, [], parameters=count_parameters(model), latency_ms=latency.p50_ms)


def save(trainer: DistillationTrainer, folder: Path, teacher: str) -> None:
    """The student and its card, as far as the trainer knows it; the teacher is one that has no name yet."""
    trainer.save_model(str(folder))
    config = trainer.model.config
    name = f"Digits, {config.num_hidden_layers} x {config.hidden_size} vision transformer"
    facts = facts_of(trainer, model_name=name, dataset=DATA)
    facts.teachers = [replace(source, name=teacher) for source in facts.teachers]
    facts.license = License(notes=("Teacher and student started from random weights: no licence is inherited.",))
    write_card(folder, facts)


def finish_card(folder: Path, lines: list[Result], images: str, seeds: int) -> None:
    """The card with the table, and what the trainer does not know."""
    first = percent(lines[1].accuracy[:1])
    notes = (
        f"{images} images. Retention is accuracy divided by the teacher's, agreement the share of answers that are "
        "the teacher's; ms is the median forward pass at batch 1 on one CPU thread. Both students started from the "
        f"same random weights and had the same images and number of steps; seeds: {seeds}"
        + (f", mean ± standard deviation; this student is the first, {first} %." if seeds > 1 else ".")
    )
    complete_card(
        folder, lines, notes,
        description=f"{DESCRIPTION} `examples/digits.py` of hf_distill.",
        limits=f"{LIMITS} Settings were chosen on {VALIDATION_ROWS} validation images.",
    )  # fmt: skip


def students(
    teacher: ViT, data: dict[str, Rows], asked: Rows, right: np.ndarray, job: argparse.Namespace, folder: str
) -> list[Result]:
    """The lines of the student with and without a teacher; the first distilled one is saved in `folder/student`."""
    truth, lines = labels(asked), list[Result]()
    for name, given in LOSSES.items():
        line = describe(name, vision_transformer(**STUDENT, seed=0), asked)
        for seed in range(job.seeds):
            arguments = settings(folder, job.epochs, given["learning_rate"], seed) | given
            trainer = DistillationTrainer(
                vision_transformer(**STUDENT, seed=seed),
                DistillationTrainingArguments(**arguments),
                train_dataset=data["train"],
                teacher_model=teacher if name == DISTILLED else None,
            )
            train(trainer)
            if name == DISTILLED and seed == 0:
                save(trainer, Path(folder) / "student", TEACHER_NAME)
            answer = answers(trainer, asked)
            line.accuracy.append(float((answer == truth).mean()))
            line.retention.append(line.accuracy[-1] / float((right == truth).mean()))
            line.agreement.append(float((answer == right).mean()))
        lines.append(line)
    return lines


def train_teacher(data: dict[str, Rows], epochs: int, folder: str) -> Trainer:
    """The trainer of the teacher, which learns from the labels."""
    arguments = settings(folder, epochs, TEACHER["learning_rate"], seed=0)
    trainer = Trainer(
        vision_transformer(**TEACHER, seed=0), TrainingArguments(**arguments), train_dataset=data["train"]
    )
    train(trainer)
    return trainer


def main(argv: list[str] | None = None) -> list[Result]:
    """Train the teacher, then both students for every seed; print the table and return its lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many times students are trained")
    parser.add_argument("--epochs", type=int, default=STUDENT_EPOCHS, help="epochs of every student")
    parser.add_argument("--teacher_epochs", type=int, default=TEACHER["epochs"], help="epochs of the teacher")
    parser.add_argument("--evaluate_on", default="test", help="the split of the table; choose settings on validation")
    parser.add_argument("--output_dir", help="where the first distilled student and its card go")
    job = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    say, data = Clock(), digits()
    asked = data[job.evaluate_on]
    with tempfile.TemporaryDirectory() as scratch:
        folder = job.output_dir or scratch
        trainer = train_teacher(data, job.teacher_epochs, folder)
        right = answers(trainer, asked)
        lines = [describe("teacher", trainer.model, asked)]
        lines[0].accuracy.append(float((right == labels(asked)).mean()))
        say("teacher trained")
        lines += students(trainer.model, data, asked, right, job, folder)
        finish_card(Path(folder) / "student", lines, f"{len(asked)} {job.evaluate_on}", job.seeds)
    say(f"students trained\n\n{table(lines)}")
    return lines


if __name__ == "__main__":
    main()
