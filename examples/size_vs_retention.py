r"""How small may a student be? The curve of size against retention, for a teacher and its data.

    python examples/movie_sentences.py --output_dir out                     # fine-tunes a teacher
    python examples/size_vs_retention.py --teacher out/teacher --output_dir out/sizes

For each compression `hf_distill.recipes.compress` makes a student and teaches it, with its defaults. Beside it
stand, trained by labels alone and each with its best epoch on validation rows:

(a) the same student before training: what its weights from the teacher are worth without its answers;
(b) the same shape from random weights.

Both have as many training rows as the recipe at most, stop after three epochs without a gain, and take the learning
rate that is best on validation rows with the first seed at this size, of three that are scaled with the width as the
recipe's. The last line, counts or pixels and a linear model, is what any student must beat. Nothing is chosen on the
test rows.

Retention is the accuracy as a share of the teacher's; above chance, (accuracy - chance) / (teacher's - chance), where
chance is the share of the most frequent class of the test's labels. Words are judged one by one.

The table, `results.json` and (with matplotlib) `size_vs_retention.png` are written to `--output_dir`. Run again, it
goes on where it was stopped. Any classifier of texts, pairs, words or images will do, with its dataset:

    python examples/size_vs_retention.py --teacher textattack/bert-base-uncased-SST-2 --data stanfordnlp/sst2
    python examples/size_vs_retention.py --teacher my_tagger --data brown_tags     # examples/data/make_brown_tags.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import datasets
import numpy as np
import transformers
from _counts import by_counting
from _results import Result, table
from _sentence_job import Clock
from _size_figure import figure
from _size_options import Sizes, Start
from _size_runs import CARRIED, RANDOM, RECIPE, Answers, Runs
from transformers import HfArgumentParser

from hf_distill.metrics.scores import accuracy, agreement, retention, retention_above_chance
from hf_distill.tasks import IGNORED

DRAWS = 1000


def line_of(name: str, outputs: Sequence[Answers], teacher: Answers, labels: np.ndarray) -> Result:
    """One model's line of the table.

    Args:
        name: What it is called.
        outputs: Its answers, of every seed.
        teacher: The teacher's.
        labels: Of the test.
    """
    line = Result(name, [])
    best = accuracy(teacher["test"], labels)
    chance = float(np.bincount(labels[labels != IGNORED]).max() / (labels != IGNORED).sum())
    for output in outputs:
        line.accuracy.append(accuracy(output["test"], labels))
        line.retention.append(retention(line.accuracy[-1], best))
        if best > chance:  # else the teacher has learned nothing to keep
            line.above_chance.append(retention_above_chance(line.accuracy[-1], best, chance))
        line.agreement.append(agreement(output["test"], teacher["test"]))
        if "held_out" in output:
            line.held_out_agreement.append(agreement(output["held_out"], teacher["held_out"]))
    line.parameters = int(outputs[0]["parameters"])
    return line


def by_row(right: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums over the examples of each row: words of one sentence are drawn together.

    Shape:
        (S, N), (R,) -> (S, R), N the sum of the lengths.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return np.diff(np.concatenate([np.zeros((len(right), 1)), np.cumsum(right, 1)], 1)[:, ends], axis=1)


def bootstrap(values: Sequence[np.ndarray], draws: int = DRAWS) -> np.ndarray:
    """Means of several quantities over rows and seeds drawn again, the same ones for all.

    Shape:
        several (S, R) -> (draws, how many).
    """
    draw = np.random.default_rng(0)
    seeds, rows = values[0].shape
    means = []
    for _ in range(draws):
        chosen = np.ix_(draw.integers(seeds, size=seeds), draw.integers(rows, size=rows))
        means.append([value[chosen].mean() for value in values])
    return np.array(means)


def intervals(
    lines: dict[str, Result], outputs: dict[str, list[Answers]], teacher: Answers, labels: np.ndarray,
    lengths: np.ndarray,
) -> str:  # fmt: skip
    """The recipe's retention with its 95 % interval, and its gain over the better baseline with two standard errors,
    by a paired bootstrap over rows and seeds.
    """
    kept = labels != IGNORED
    judged = by_row(kept[None].astype(float), lengths)

    def right(answers: Sequence[np.ndarray]) -> np.ndarray:
        return by_row((np.stack(list(answers)) == labels) * kept, lengths)

    found = {name: right([output["test"] for output in some]) for name, some in outputs.items()}
    base = np.repeat(right([teacher["test"]]), len(outputs[RECIPE]), 0)
    judged = np.repeat(judged, len(outputs[RECIPE]), 0)
    drawn = bootstrap([found[RECIPE], base])
    drawn = drawn[drawn[:, 1] > 0]
    if not len(drawn):
        return "the teacher is never right, so that nothing can be kept"
    low, high = 100 * np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    text = f"retention {100 * mean(lines[RECIPE].retention):.1f} % ({low:.1f} to {high:.1f})"
    if CARRIED in found:
        better = max((CARRIED, RANDOM), key=lambda name: mean(lines[name].accuracy))
        gains = found[RECIPE] - found[better]
        drawn = bootstrap([gains, judged])
        error = float(np.std(drawn[:, 0] / drawn[:, 1]))
        text += f"; {100 * gains.sum() / judged.sum():+.1f} ± {200 * error:.1f} points over {better}"
    return text


def row_lengths(start: Start) -> np.ndarray:
    """How many examples each test row has: its words, or one. Shape: (R,)."""
    test = start.data["test"]
    words = start.task.kind == "words"
    return np.array([len(row) for row in test[start.task.inputs[0]]] if words else [1] * len(test))


def curve(start: Start, teacher: Answers, labels: np.ndarray) -> tuple[list[Result], dict[str, str]]:
    """The lines of the students, and what is to be said of each size."""
    say, results, notes = Clock(), [], {}
    for compression in map(float, start.job.compressions.split(",")):
        runs = Runs(start, compression)
        outputs: dict[str, list[Answers]] = {}
        for seed in range(start.job.seeds):
            for name, output in runs.run(seed).items():
                outputs.setdefault(name, []).append(output)
            say(f"{compression:g}x, seed {seed}: done")
        lines = {name: line_of(f"{compression:g}x {name}", some, teacher, labels) for name, some in outputs.items()}
        rates = "".join(f"; {name} at {rate:g}" for name, rate in runs.chosen.items())
        notes[f"{compression:g}x"] = intervals(lines, outputs, teacher, labels, row_lengths(start)) + rates
        results += lines.values()
    return results, notes


def main() -> None:
    """The whole curve."""
    (job,) = HfArgumentParser(Sizes).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = Start.of(job)
    print(f"Task: {start.task}")
    labels = start.labels("test")
    answer = start.answers(start.teacher, start.reader)
    teacher = Result("teacher", [accuracy(answer["test"], labels)], parameters=start.teacher.num_parameters())
    results, notes = curve(start, answer, labels)
    counted = by_counting(start.task, start.data, start.reader)
    if counted is not None:
        name, (classes, size) = counted
        results.append(line_of(name, [{"test": classes, "parameters": np.array(size)}], answer, labels))
    results = [teacher, *results]
    print(f"\n{table(results)}\n")
    for size, note in notes.items():
        print(f"{size}: {note}")
    content = {"job": asdict(job), "results": [asdict(r) for r in results], "notes": notes}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    figure(results, teacher, folder / "size_vs_retention.png")


if __name__ == "__main__":
    main()
