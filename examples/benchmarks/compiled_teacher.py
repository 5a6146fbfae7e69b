"""Does `torch.compile` make the teacher's one pass cheaper? A cache is filled by one teacher, as it is and compiled.

CPU time of one process on one thread, variants interleaved round by round. The first fill contains the compiling.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from step import SHAPES, collate, model, rows

from hf_distill import cache_teacher_outputs


def fill(teacher: Any, data: Dataset, dtype: str) -> tuple[float, torch.Tensor]:
    """CPU seconds of asking about every row, and the answers. Shape: (N, V)."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        asked = cache_teacher_outputs(
            data, teacher, data_collator=collate, cache_dir=folder, dtype=dtype, progress=False
        )
        seconds = time.process_time() - start
        return seconds, torch.tensor(asked["teacher_logits"])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=SHAPES, default="12x768")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    data = Dataset.from_list(rows(options.rows))
    print("| dtype | variant | first fill, CPU s | later fills, median [min-max] | of eager | largest difference |")
    print("|---|---|---|---|---|---|")
    for dtype in options.dtypes:
        eager, compiled = model(options.teacher, seed=2).eval(), model(options.teacher, seed=2).eval()
        compiled.compile(dynamic=True)
        teachers = {"eager": eager, "torch.compile": compiled}
        first = {name: fill(teacher, data, dtype) for name, teacher in teachers.items()}
        later: dict[str, list[float]] = {name: [] for name in teachers}
        for _ in range(options.rounds):
            for name, teacher in teachers.items():
                later[name].append(fill(teacher, data, dtype)[0])
        for name, seconds in later.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, later["eager"], strict=True))
            apart = (first[name][1] - first["eager"][1]).abs().max().item()
            print(
                f"| {dtype} | {name} | {first[name][0]:.1f} | {statistics.median(seconds):.1f} "
                f"[{min(seconds):.1f}-{max(seconds):.1f}] | {ratio:.3f} | {apart:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
