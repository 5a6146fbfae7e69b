"""Distil through assistants: large -> middle -> small, against large -> small. Two minutes on a CPU.

    pip install scikit-learn
    python examples/assistants.py
    python examples/assistants.py --sizes 6x96 4x64 3x32 2x16 --epochs 40 --seeds 5

Where a student is much smaller than its teacher, a model between them may teach it better (Mirzadeh et al., 2020,
"Improved Knowledge Distillation via Teacher Assistant"). Each model of the chain learns from the one before it, from
its answers and the labels; the last of them also directly from the first, from the same weights and for as many steps,
and from the labels alone. The assistants are extra training that the direct student does without.

The defaults gave (2026-11-25; two seeds, 597 test images):

    model                         accuracy %  parameters
    4x64, labels alone (teacher)  94.5 ± 1.7     136,138
    3x32, from 4x64               95.2 ± 1.3      26,762
    2x12, from 3x32               87.4 ± 4.7       2,998
    2x12, from 4x64 directly      84.8 ± 7.2       2,998
    2x12, labels alone            92.5 ± 0.6       2,998

The assistant brought 2.6 points (standard deviation over the seeds 2.5) over the direct way, but the labels alone
taught this smallest student better than either: in as many steps, soft targets of temperature 4 want a higher learning
rate or more of them (see `digits.py`). Nothing was tuned for any line, and a difference of a few images says nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import transformers
from _results import Result, complete_card, percent, table
from _sentence_job import LABELS_ONLY, Clock
from _training import train
from digits import (
    DESCRIPTION,
    LIMITS,
    LOSSES,
    STUDENT_EPOCHS,
    STUDENT_LEARNING_RATE,
    Rows,
    answers,
    describe,
    digits,
    labels,
    save,
    settings,
    vision_transformer,
)
from transformers import ViTForImageClassification as ViT

from hf_distill import DistillationTrainer, DistillationTrainingArguments

Learned = tuple[DistillationTrainer, np.ndarray]  # a trained model's trainer, and the model's test answers


def learn(
    size: dict[str, int], teacher: ViT | None, data: dict[str, Rows], options: argparse.Namespace, seed: int
) -> Learned:
    """A model of a size, taught by another or by the labels alone."""
    weights = LOSSES[LABELS_ONLY] if teacher is None else {"temperature": options.temperature}
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(folder, options.epochs, STUDENT_LEARNING_RATE, seed) | weights
        trainer = DistillationTrainer(
            vision_transformer(**size, seed=seed),
            DistillationTrainingArguments(**arguments),
            train_dataset=data["train"],
            teacher_model=teacher,
        )
        train(trainer)
        return trainer, answers(trainer, data["test"])


def parse_size(text: str) -> dict[str, int]:
    """`LAYERSxWIDTH` as what `vision_transformer` takes."""
    layers, width = text.split("x")
    return {"layers": int(layers), "hidden_size": int(width)}


def chain(data: dict[str, Rows], options: argparse.Namespace, seed: int) -> dict[str, Learned]:
    """Every line of the table for one seed; the last but two is the student that learned through assistants."""
    sizes = options.sizes
    shapes = [parse_size(size) for size in sizes]
    found = {f"{sizes[0]}, labels alone (teacher)": learn(shapes[0], None, data, options, seed)}
    large = model = next(iter(found.values()))[0].model
    for number, shape in enumerate(shapes[1:], 1):
        learned = learn(shape, model, data, options, seed)
        found[f"{sizes[number]}, from {sizes[number - 1]}"], model = learned, learned[0].model
    found[f"{sizes[-1]}, from {sizes[0]} directly"] = learn(shapes[-1], large, data, options, seed)
    found[f"{sizes[-1]}, labels alone"] = learn(shapes[-1], None, data, options, seed)
    return found


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train everything for every seed; print the table and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4x64", "3x32", "2x12"], help="LAYERSxWIDTH, the teacher first")
    parser.add_argument("--epochs", type=int, default=STUDENT_EPOCHS, help="of every model")
    parser.add_argument("--seeds", type=int, default=2, help="how many times everything is trained")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--output_dir", type=Path, help="where the first student of the chain and its card go")
    options = parser.parse_args(arguments)
    if len(options.sizes) < 3:
        raise SystemExit("A chain has at least three --sizes: a teacher, an assistant and a student.")
    transformers.logging.set_verbosity_error()
    say, data, lines = Clock(), digits(), dict[str, Result]()
    right = labels(data["test"])
    for seed in range(options.seeds):
        found = chain(data, options, seed)
        for name, (trainer, answer) in found.items():
            line = lines.setdefault(name, describe(name, trainer.model, data["test"]))
            line.accuracy.append(float((answer == right).mean()))
        if options.output_dir and seed == 0:
            student, _ = list(found.values())[-3]
            save(student, options.output_dir / "student", f"the {options.sizes[-2]} assistant of the same script")
        say(f"seed {seed}")
    results = list(lines.values())
    told = difference(results[-3].accuracy, results[-2].accuracy, len(right))
    print(f"\n{table(results)}\n\n{told}")
    if options.output_dir:
        finish_card(options, results, told)
    return results


def finish_card(options: argparse.Namespace, results: list[Result], told: str) -> None:
    """The card with the table, and what the trainer does not know."""
    notes = (
        f"{told} ms is the median forward pass at batch 1 on one CPU thread. The last three lines started from the "
        f"same random weights and had as many steps; seeds: {options.seeds}"
        + (", mean ± standard deviation." if options.seeds > 1 else ".")
    )
    complete_card(
        options.output_dir / "student", results, notes,
        description=f"{DESCRIPTION} `examples/assistants.py` of hf_distill at the end of a chain: "
        f"{', then '.join(options.sizes)}.",
        limits=f"{LIMITS} Learning rate and epochs were chosen for another size of student, nothing for the chain.",
    )  # fmt: skip


def difference(chained: list[float], direct: list[float], images: int) -> str:
    """What the assistants brought, paired by seed."""
    gains = [ours - theirs for ours, theirs in zip(chained, direct, strict=True)]
    spread = f" (standard deviation over the seeds {100 * stdev(gains):.1f})" if len(gains) > 1 else ""
    return (
        f"Through assistants {percent(chained)} %, directly {percent(direct)} %: {100 * mean(gains):+.1f} points"
        f"{spread}, on {images} images."
    )


if __name__ == "__main__":
    main()
