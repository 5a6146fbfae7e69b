"""Peak memory of plain fine-tuning, the docs' recipe and learning from a teacher cache: a process for each."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch
from _device import DEVICES, peak_megabytes
from step import SHAPES, model, rows, train
from transformers import BertForSequenceClassification


def peak(variant: str, options: argparse.Namespace, cache: Path) -> float:
    """Peak memory of this process after one training run, in MB."""
    torch.set_num_threads(1)
    teacher = BertForSequenceClassification.from_pretrained(options.teacher_path) if variant == "docs" else None
    train(variant, options, rows(options.rows), teacher, cache)
    return peak_megabytes(options.device)


def main() -> None:
    """Fill a cache, then measure each variant in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", choices=SHAPES, default="12x768")
    parser.add_argument("--student", choices=SHAPES, default="4x312")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    options = parser.parse_args()
    options.vocabulary = 30_522
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        options.teacher_path = Path(scratch) / "teacher"
        model(options.teacher, seed=2).save_pretrained(options.teacher_path)
        peaks = {}
        for variant in ("cache", "docs", "plain", "cache, padded", "cache, second run"):
            with fresh.Pool(1) as pool:
                peaks[variant] = pool.apply(peak, (variant, options, Path(scratch) / "cache"))
    print(f"\nteacher {options.teacher}, student {options.student}, {options.rows} rows, batch {options.batch_size}\n")
    print("| variant | peak MB | of plain |\n|---|---|---|")
    for variant, megabytes in peaks.items():
        print(f"| {variant} | {megabytes:.0f} | {megabytes / peaks['plain']:.3f} |")


if __name__ == "__main__":
    main()
