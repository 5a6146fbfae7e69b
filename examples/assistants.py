"""Distil through assistants: large -> middle -> small, against large -> small. Less than a minute on a CPU.

    pip install scikit-learn
    python examples/assistants.py
    python examples/assistants.py --sizes 6x96 4x64 3x32 2x16 --epochs 40 --seeds 5

Where a student is much smaller than its teacher, a model between them may teach it better (Mirzadeh et al., 2020,
"Improved Knowledge Distillation via Teacher Assistant"). Each model of the chain learns from the one before it, from
its answers and the labels; the last of them also directly from the first, from the same weights and for as many steps,
and from the labels alone. The assistants are extra training that the direct student does without.

A demonstration on scikit-learn's handwritten digits, see `digits.py`: nothing was tuned for either side, and a
difference of a few images says nothing. The last line tells how large it is beside its spread over the seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import mean, stdev
from typing import Any

import datasets
import numpy as np
import transformers
from _results import Result, percent, table
from _training import train
from digits import STUDENT_LEARNING_RATE, answers, describe, digits, settings, vision_transformer
from transformers import ViTForImageClassification as ViT

from hf_distill import DistillationTrainer, DistillationTrainingArguments

LABELS_ONLY = {"soft_target_weight": 0.0, "hard_label_weight": 1.0}


def learn(
    size: dict[str, int], teacher: ViT | None, data: Any, options: argparse.Namespace, seed: int
) -> tuple[ViT, np.ndarray]:
    """A model of a size, taught by another or by the labels alone; the model and its test answers."""
    weights = LABELS_ONLY if teacher is None else {"temperature": options.temperature}
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(folder, options.epochs, STUDENT_LEARNING_RATE, seed)
        trainer = DistillationTrainer(
            vision_transformer(**size, seed=seed),
            DistillationTrainingArguments(**arguments, **weights),
            train_dataset=data["train"],
            teacher_model=teacher,
        )
        train(trainer)
        return trainer.model, answers(trainer, data["test"])


def parse_size(text: str) -> dict[str, int]:
    """`LAYERSxWIDTH` as what `vision_transformer` takes."""
    layers, width = text.split("x")
    return {"layers": int(layers), "hidden_size": int(width)}


def chain(sizes: list[str], data: Any, options: argparse.Namespace, seed: int) -> dict[str, tuple[ViT, np.ndarray]]:
    """Every line of the table for one seed: its model and its answers."""
    shapes = [parse_size(size) for size in sizes]
    found = {f"{sizes[0]}, labels alone (teacher)": learn(shapes[0], None, data, options, seed)}
    large = model = next(iter(found.values()))[0]
    for number, shape in enumerate(shapes[1:], 1):
        model, answer = learn(shape, model, data, options, seed)
        found[f"{sizes[number]}, from {sizes[number - 1]}"] = model, answer
    found[f"{sizes[-1]}, from {sizes[0]} directly"] = learn(shapes[-1], large, data, options, seed)
    found[f"{sizes[-1]}, labels alone"] = learn(shapes[-1], None, data, options, seed)
    return found


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train everything for every seed; print the table and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4x64", "3x32", "2x12"], help="LAYERSxWIDTH, the teacher first")
    parser.add_argument("--epochs", type=int, default=10, help="of every model")
    parser.add_argument("--seeds", type=int, default=2, help="how many times everything is trained")
    parser.add_argument("--temperature", type=float, default=4.0)
    options = parser.parse_args(arguments)
    if len(options.sizes) < 3:
        raise SystemExit("A chain has at least three --sizes: a teacher, an assistant and a student.")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start, data, lines = time.perf_counter(), digits(), {}
    right = np.asarray(data["test"]["labels"])
    for seed in range(options.seeds):
        for name, (model, answer) in chain(options.sizes, data, options, seed).items():
            line = lines.setdefault(name, describe(name, model, data["test"]))
            line.accuracy.append(float((answer == right).mean()))
        print(f"[{time.perf_counter() - start:5.1f} s] seed {seed}", flush=True)
    results = list(lines.values())
    print(f"\n{table(results)}\n\n{difference(results[-3].accuracy, results[-2].accuracy, len(right))}")
    return results


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
