"""Time and memory of the device that a benchmark measures."""

from __future__ import annotations

import resource
import time

import torch

DEVICES = ("cpu", "cuda")
UNIT = {"cpu": "CPU s", "cuda": "s"}


def clock(device: str) -> float:
    """Seconds: CPU time of this process, or wall time once a GPU has done all that was asked of it."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_megabytes(device: str) -> float:
    """The most this process has held so far: all of it, or its tensors on the GPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return torch.cuda.max_memory_allocated() / 1e6
