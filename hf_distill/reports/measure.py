"""What a model costs: its parameters, its weights on disk, its answer time.

Imports torch and the standard library alone; knows no task and no Trainer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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
    model: nn.Module,
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
        model: Any model, on the device where it shall be timed.
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
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in inputs]
    with _threads(threads), _eval_mode(model), torch.inference_mode():
        for run in range(warmup):
            model(**batches[run % len(batches)])
        times = [_time_once(model, batches[run % len(batches)], device) for run in range(runs)]
    p50, p90 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9]).double())
    return Latency(p50.item(), p90.item(), runs, threads, str(device))


def _time_once(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> float:
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
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a model in train mode may hold a frozen part that was put into eval mode.
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
