"""What a model costs: its parameters, its weights on disk, its memory, its answer time.

Imports torch and the standard library alone; knows no task and no Trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.reports.memory import peak_memory_megabytes

# What `save_pretrained` calls weights; a tokenizer or a training state beside them is no part of the model.
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Latency:
    """Answer times of single forward passes, and the conditions without which they mean nothing."""

    p50_ms: float
    p90_ms: float
    runs: int
    threads: int
    device: str
    p95_ms: float
    rows_per_second: float


@dataclass(frozen=True)
class Cost:
    """What a model takes, on one device.

    Attributes:
        parameters: How many numbers it holds.
        disk_mb: Its weights on disk, in MB; `None` where no folder was named.
        peak_memory_mb: Weights and one forward pass of the largest batch, in MB (see `peak_memory_megabytes`).
        latency: Rows of a batch -> its answer times.
    """

    parameters: int | None = None
    disk_mb: float | None = None
    peak_memory_mb: float | None = None
    latency: Mapping[int, Latency] = field(default_factory=dict)


def count_parameters(model: nn.Module) -> int:
    """All parameters, shared ones counted once, frozen ones included.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def disk_megabytes(folder: str | Path) -> float:
    """Size of the weights that a saved model's folder holds, in MB (10^6 bytes).

    Raises:
        ValueError: If the folder holds no weights.
    """
    # Where both formats lie side by side, `from_pretrained` reads the first: they are not added up.
    for pattern in WEIGHT_PATTERNS:
        sizes = [path.stat().st_size for path in Path(folder).glob(pattern)]
        if sizes:
            return sum(sizes) / 1e6
    raise ValueError(f"{folder} holds no weights ({' or '.join(WEIGHT_PATTERNS)}). Save the model there first.")


def measure_latency(
    model: Callable[..., Any],
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    runs: int = 100,
    warmup: int = 10,
    threads: int = 1,
) -> Latency:
    """Time single forward passes, one after the other, in eval mode and without gradients.

    Preparing the inputs (a tokenizer's work) is not part of it. The number of threads and the mode
    of every submodule are as before afterwards.

    Args:
        model: Any model, on the device where it shall be timed. Another callable runs on the CPU; a runtime with
            threads of its own must be given the same number by the caller.
        inputs: Ready batches as keyword arguments of the model; taken in turn, so that ragged
            real inputs give the mixture of lengths that they have.
        runs: How many passes are timed.
        warmup: How many passes go before, untimed: the first ones allocate memory and pick kernels.
        threads: CPU threads of one pass. One is what a busy server gives, and what repeats best.

    Raises:
        ValueError: If there are no inputs, or a number is too small.
    """
    if not inputs:
        raise ValueError("measure_latency needs at least one batch in `inputs`, got none.")
    if runs < 1 or warmup < 0 or threads < 1:
        raise ValueError(
            "measure_latency needs runs >= 1, warmup >= 0 and threads >= 1, "
            f"got runs={runs}, warmup={warmup}, threads={threads}."
        )
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in inputs]
    with _threads(threads), _eval_mode(model), torch.inference_mode():
        for run in range(warmup):
            model(**batches[run % len(batches)])
        times = [_time_once(model, batches[run % len(batches)], device) for run in range(runs)]
    quantiles = torch.tensor([0.5, 0.9, 0.95], dtype=torch.float64)
    p50, p90, p95 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    rows = sum(_rows(batches[run % len(batches)]) for run in range(runs))
    return Latency(p50, p90, runs, threads, str(device), p95, 1e3 * rows / sum(times))


def measure_cost(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    *,
    folder: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    runs: int = 100,
    warmup: int = 5,
    threads: int = 1,
) -> Cost:
    """Everything that a report says about a model's cost, on the device that the model is on.

    Args:
        model: The model.
        rows: Rows to run it on, taken in turn, as a dataset gives them. Labels are left out.
        collate: Makes a batch of rows, a Transformers data collator.
        folder: Where the model is saved, for its size on disk.
        batch_sizes: Rows of a batch; memory is measured with the largest.
        runs: Timed passes at batch 1; larger batches have fewer, but at least 20 (or `runs`).
        warmup: Untimed passes before each.
        threads: CPU threads of one pass.

    Raises:
        ValueError: If there are no rows, no batch sizes, or the folder holds no weights.
    """
    if not len(rows) or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"measure_cost needs rows and batch sizes >= 1, got {len(rows)} rows, sizes {batch_sizes}.")
    disk = None if folder is None else disk_megabytes(folder)
    latency = latencies(model, rows, collate, batch_sizes, runs=runs, warmup=warmup, threads=threads)
    largest = _batches(rows, collate, max(batch_sizes), 1)[0]
    with _threads(threads):
        memory = peak_memory_megabytes(model, largest)
    return Cost(count_parameters(model), disk, memory, latency)


def latencies(
    model: Callable[..., Any],
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    batch_sizes: Sequence[int] = (1, 32),
    *,
    runs: int = 100,
    warmup: int = 5,
    threads: int = 1,
) -> dict[int, Latency]:
    """Answer times of a model, or of another callable, by the rows of a batch; arguments as in [`measure_cost`]."""
    found = {}
    for size in batch_sizes:
        count = max(min(runs, 20), runs // size)
        batches = _batches(rows, collate, size, count)
        found[size] = measure_latency(model, batches, runs=count, warmup=warmup, threads=threads)
    return found


def _batches(
    rows: Sequence[Any], collate: Callable[[list[Any]], Mapping[str, Tensor]], size: int, most: int
) -> list[dict[str, Tensor]]:
    """Up to `most` batches of `size` rows, in order; the rows start over where they are too few."""
    number = min(most, max(1, len(rows) // size))
    chosen = [[rows[(first + i) % len(rows)] for i in range(size)] for first in range(0, number * size, size)]
    return [{k: v for k, v in collate(part).items() if k not in ("label", "labels")} for part in chosen]


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _time_once(model: Callable[..., Any], batch: Mapping[str, Tensor], device: torch.device) -> float:
    """Milliseconds of one pass; an accelerator is waited for on both sides."""
    _wait_for(device)
    start = time.perf_counter()
    model(**batch)
    _wait_for(device)
    return (time.perf_counter() - start) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _eval_mode(model: Callable[..., Any]) -> Iterator[None]:
    # Module by module: a model in train mode may hold a frozen part that was put into eval mode.
    before = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
