r"""How small may a student be? The curve of size against retention, for a teacher and its data.

    python examples/movie_sentences.py --output_dir out                     # fine-tunes a teacher
    python examples/size_vs_retention.py --teacher out/teacher --output_dir out/sizes

For each compression `hf_distill.recipes.compress` makes a student and teaches it, with its defaults. Beside it
stand, trained by labels alone and each with its best epoch on validation rows:

(a) the same student before training: what its weights from the teacher are worth without its answers;
(b) the same shape from random weights.

Both have as many training rows as the recipe at most, and stop after three epochs without a gain. The last line, word
counts and a linear model, is what any student must beat. Nothing is chosen on the test rows.

The table, `results.json` and (with matplotlib) `size_vs_retention.png` are written to `--output_dir`. Run again, it
goes on where it was stopped. With the Hub in reach, any text classifier and dataset do:

    python examples/size_vs_retention.py --teacher textattack/bert-base-uncased-SST-2 --dataset stanfordnlp/sst2
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import datasets
import numpy as np
import torch
import transformers
from _evaluation import score, tfidf_baseline
from _movie_data import movie_sentences, named_dataset
from _results import Result, table
from _sentence_job import Clock, option
from _sentence_models import answers, training_settings
from _training import accuracy, train
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.recipes import compress
from hf_distill.recipes.stages import fingerprint_of

RECIPE, CARRIED, RANDOM = "recipe", "(a) same start, labels only", "(b) random start, labels only"


@dataclass
class Sizes:
    """What to run.

    The recipe's own settings were chosen on the validation rows of the movie sentences at 10x; see
    `hf_distill.recipes`.
    """

    teacher: str = option("out/movie_sentences/teacher", "Folder or name of a fine-tuned classifier.")
    output_dir: str = option("out/sizes", "Where students, table and figure go.")
    compressions: str = option("10,30,100", "How many times smaller, separated by commas.")
    seeds: int = option(1, "How many times each is trained.")
    baselines: bool = option(True, "Also train by labels alone.")
    training_rows: int = option(400_000, "Rows that a student sees.")
    augmented_rows: int | None = option(None, "New texts for the teacher to judge; the recipe's default if unset.")
    unlabelled: str | None = option(None, "A file of more texts, one a line.")
    dataset: str | None = option(None, "Name or folder of a dataset; the movie sentences if unset.")
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    text_column: str = option("text", "The dataset's column of sentences.")
    label_column: str = option("label", "The dataset's column of classes.")
    max_length: int = option(48, "Tokens that are read of a sentence.")
    max_train_rows: int | None = option(None, "Train on the first rows only.")
    max_eval_rows: int | None = option(None, "Validate and test on the first rows only.")
    batch_size: int = option(32, "Rows of a training step.")
    learning_rate: float = option(2.5e-4, "Of the students that learn from labels alone.")


def load(job: Sizes) -> DatasetDict:
    """The three splits, as texts."""
    if job.dataset is None:
        data, _ = movie_sentences()
    else:
        data = named_dataset(job.dataset, job.dataset_config, job.text_column, job.label_column)
    limits = {"train": job.max_train_rows, "validation": job.max_eval_rows, "test": job.max_eval_rows}
    return DatasetDict(
        {name: data[name].select(range(min(limits[name] or len(data[name]), len(data[name])))) for name in limits}
    )


def encoded(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, length: int) -> DatasetDict:
    """With the columns that a model with this tokenizer reads."""
    return data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=length), batched=True)


def with_labels_alone(
    job: Sizes,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    folder: Path,
    seed: int,
) -> PreTrainedModel:
    """A baseline: the best epoch on validation rows."""
    epochs = max(1, job.training_rows // len(data["train"]))
    settings = training_settings(
        folder, epochs, job.learning_rate, seed=seed, per_device_train_batch_size=job.batch_size
    )
    args = DistillationTrainingArguments(**settings, soft_target_weight=0.0, hard_label_weight=1.0)
    trainer = DistillationTrainer(
        student, args, train_dataset=data["train"], eval_dataset=data["validation"], processing_class=tokenizer,
        compute_metrics=accuracy, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )  # fmt: skip
    train(trainer)
    return trainer.model


def run(
    job: Sizes, compression: float, data: DatasetDict, unlabelled: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """The three students of one size and seed: each one's logits on the test rows, kept for the next time."""
    folder = Path(job.output_dir) / f"{compression:g}x-seed{seed}"
    same = {name: value for name, value in asdict(job).items() if name not in ("seeds", "compressions", "baselines")}
    settings = {**same, "compression": compression, "seed": seed, "texts": list(unlabelled)}
    file = folder / f"test_logits-{fingerprint_of(settings)}.npz"  # other settings, other answers
    known = dict(np.load(file)) if file.is_file() else {}
    teacher = AutoModelForSequenceClassification.from_pretrained(job.teacher)
    tokenizer = AutoTokenizer.from_pretrained(job.teacher)
    held_out = [*data["validation"]["text"], *data["test"]["text"]]
    made = compress(
        teacher, tokenizer, data["train"], folder, compression=compression, unlabelled=unlabelled, exclude=held_out,
        augmented_rows=job.augmented_rows, training_rows=job.training_rows, max_length=job.max_length, seed=seed,
        answers_dir=Path(job.output_dir) / "answers", arguments={"per_device_train_batch_size": job.batch_size},
    )  # fmt: skip
    rows = encoded(data, made.processing_class, job.max_length)

    def keep(name: str, student: PreTrainedModel) -> None:
        known[name] = answers(student, rows["test"], made.processing_class).numpy()
        known["parameters"] = np.array(student.num_parameters())
        np.savez(file.with_suffix(".unfinished.npz"), **known)
        file.with_suffix(".unfinished.npz").replace(file)

    if RECIPE not in known:
        keep(RECIPE, made.student)
    for name in (CARRIED, RANDOM) if job.baselines else ():
        if name not in known:
            student = AutoModelForSequenceClassification.from_pretrained(folder / "start")
            set_seed(seed)
            if name == RANDOM:
                student = type(student)(student.config)
            keep(name, with_labels_alone(job, student, made.processing_class, rows, folder / "labels", seed))
    return known


def paired_gain(results: dict[str, Result], labels: torch.Tensor, outputs: list[dict[str, np.ndarray]]) -> str:
    """How much better than the better baseline, with two standard errors by a bootstrap over rows and seeds."""
    better = max((CARRIED, RANDOM), key=lambda name: mean(results[name].accuracy))
    truth = labels.numpy()
    gains = np.stack(
        [(o[RECIPE].argmax(-1) == truth).astype(float) - (o[better].argmax(-1) == truth) for o in outputs]
    )  # (seeds, rows)
    draw = np.random.default_rng(0)
    means = [
        gains[draw.integers(len(gains), size=len(gains))][:, draw.integers(gains.shape[1], size=gains.shape[1])].mean()
        for _ in range(1000)
    ]
    return f"{100 * gains.mean():+.1f} ± {200 * np.std(means):.1f} points over {better}"


def figure(results: list[Result], teacher: Result, file: Path) -> None:
    """Size against retention, on a logarithmic axis."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("No figure: it needs `pip install matplotlib`.")
        return
    picture, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, marker in ((RECIPE, "o"), (CARRIED, "s"), (RANDOM, "^")):
        lines = [r for r in results if r.name.endswith(name) and r.retention]
        if lines:
            sizes = [line.parameters / 1e6 for line in lines if line.parameters]
            heights = [100 * mean(line.retention) for line in lines]
            spread = [
                100 * float(np.std(line.retention, ddof=1)) if len(line.retention) > 1 else 0.0 for line in lines
            ]
            axes.errorbar(sizes, heights, spread, marker=marker, capsize=3, label=name)
    for line in results:
        if line.name.startswith("TF-IDF"):
            axes.axhline(100 * mean(line.retention), color="grey", linestyle=":", label=line.name)
    axes.set(xscale="log", xlabel="million parameters", ylabel="retention: % of the teacher's accuracy")
    ticks = sorted({line.parameters / 1e6 for line in results if line.parameters and line.name.endswith(RECIPE)})
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"Teacher: {teacher.parameters / 1e6:.1f} M, {100 * teacher.accuracy[0]:.1f} %")  # type: ignore[operator]
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(file, dpi=150)
    print(f"figure: {file}")


def main() -> None:
    """The whole curve."""
    (job,) = HfArgumentParser(Sizes).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    random.seed(0)
    say, folder = Clock(), Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data = load(job)
    unlabelled = Path(job.unlabelled).read_text(encoding="utf-8").splitlines() if job.unlabelled else []
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(job.teacher),
        AutoTokenizer.from_pretrained(job.teacher),
    )
    labels = torch.tensor(data["test"]["label"])
    answer = answers(model, encoded(data, tokenizer, job.max_length)["test"], tokenizer).argmax(-1)
    teacher = Result("teacher", [(answer == labels).double().mean().item()], parameters=model.num_parameters())
    results, gains = [], {}
    for compression in map(float, job.compressions.split(",")):
        outputs = []
        for seed in range(job.seeds):
            outputs.append(run(job, compression, data, unlabelled, seed))
            say(f"{compression:g}x, seed {seed}: done")
        lines = {
            name: Result(f"{compression:g}x {name}", []) for name in (RECIPE, CARRIED, RANDOM) if name in outputs[0]
        }
        for name, line in lines.items():
            line.parameters = int(outputs[0]["parameters"])
            for output in outputs:
                score(line, torch.from_numpy(output[name]).argmax(-1), labels, answer)
        if CARRIED in lines:
            gains[f"{compression:g}x"] = paired_gain(lines, labels, outputs)
        results += lines.values()
    results = [teacher, *results, *filter(None, [tfidf_baseline(data, answer)])]
    print(f"\n{table(results)}\n")
    for size, gain in gains.items():
        print(f"{size}: {gain}")
    content = {"job": asdict(job), "results": [asdict(r) for r in results], "gains": gains}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    figure(results, teacher, folder / "size_vs_retention.png")


if __name__ == "__main__":
    main()
