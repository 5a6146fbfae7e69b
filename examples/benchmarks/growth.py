"""How the cost of the teacher cache grows with rows, length and vocabulary: linearly, or it is a bug.

A small teacher and a small student, so that the cache's own work is not hidden behind theirs. One epoch with the cache
empty (asking the teacher included), one more run with it full, and plain fine-tuning; CPU time of one process on one
thread, variants interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from step import SHAPES, model, rows, train

VARIANTS = ("plain", "cache", "cache, second run")


def measure(options: argparse.Namespace, count: int, length: float, vocabulary: int) -> dict[str, float]:
    """Median CPU seconds of each variant, and the size of the cache in MB."""
    options.vocabulary = vocabulary
    data = rows(count, length, vocabulary)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        options.teacher_path = Path(scratch) / "teacher"
        model(options.teacher, 2, vocabulary).save_pretrained(options.teacher_path)
        for number in range(options.rounds):
            cache = Path(scratch) / f"cache-{number}"
            for name in VARIANTS:
                seconds[name].append(train(name, options, data, None, cache)[0])
        size = sum(file.stat().st_size for file in cache.rglob("*.arrow")) / 1e6
    line = {name: statistics.median(spent) for name, spent in seconds.items()}
    return {"tokens": sum(len(row["input_ids"]) for row in data), **line, "MB": size}


def main() -> None:
    """Print one table: rows grow, then lengths, then the vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=SHAPES, default="2x128")
    parser.add_argument("--student", choices=SHAPES, default="2x128")
    parser.add_argument("--rows", type=int, nargs="+", default=[1250, 2500, 5000, 10_000])
    parser.add_argument("--lengths", type=float, nargs="+", default=[2.0, 4.0], help="Times the usual lengths.")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[7_630, 122_088])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    options = parser.parse_args()
    options.epochs = 1
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    few = min(options.rows)
    points = [(count, 1.0, 30_522) for count in options.rows]
    points += [(few, length, 30_522) for length in options.lengths]
    points += [(few, 1.0, vocabulary) for vocabulary in options.vocabularies]
    print(f"teacher {options.teacher}, student {options.student}, batch {options.batch_size}, {options.rounds} rounds")
    print(
        "\n| rows | length | vocabulary | tokens | plain, s | cache, s | second run, s | cache - second run, s | MB |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    lines = []
    for count, length, vocabulary in points:
        line = measure(options, count, length, vocabulary)
        lines.append({"rows": count, "length": length, "vocabulary": vocabulary, **line})
        plain, first, second = (line[name] for name in VARIANTS)
        print(
            f"| {count:,} | {length:g} | {vocabulary:,} | {line['tokens']:,} | {plain:.1f} | {first:.1f} | "
            f"{second:.1f} | {first - second:.1f} | {line['MB']:.2f} |",
            flush=True,
        )
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
