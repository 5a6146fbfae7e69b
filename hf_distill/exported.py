"""What exported students are worth: parity with the student, size, speed; and their answers on other rows.

Needs the extra `export`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Of a float32 graph; a part of the largest logit where that is above 1.
_TOLERANCE = 1e-3
_WARMUP = 10

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExportedStudent:
    """One exported file, run by ONNX Runtime on the CPU and compared with the student that it was made from.

    Args:
        folder: Where it lies; `transformers.exporters.ExportedModel.from_pretrained(folder)` loads it.
        max_difference: Largest absolute difference of a logit to the student's.
        agreement: Share of positions whose largest logit is the student's too; of rows with several labels, of those
            whose labels all are; `None` for a regression.
        megabytes: Size of graph and weights in MB (10^6 bytes).
        p50_ms: Median answer time for one row.
        student_p50_ms: The same of the student in PyTorch, measured in turn with it.
        threads: Threads of one answer.
    """

    folder: Path
    max_difference: float
    agreement: float | None
    megabytes: float
    p50_ms: float
    student_p50_ms: float
    threads: int


def measure(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], folders: Mapping[str, Path], runs: int, threads: int
) -> dict[str, ExportedStudent]:
    """Run exported graphs and their student on the same batches; figures by the name of the graph."""
    sessions = {name: session(folder / "model.onnx", threads) for name, folder in folders.items()}
    with torch.inference_mode():
        expected = [_logits(model(**batch)) for batch in batches]
        answers = {name: [run(batch) for batch in batches] for name, run in sessions.items()}
        rows = [{k: v[:1] for k, v in batch.items()} for batch in batches]
        times = _times({"student": lambda batch: model(**batch), **sessions}, rows, runs, threads)
    results = {}
    for name, folder in folders.items():
        pairs = [
            pair
            for ours, theirs in zip(answers[name], expected, strict=True)
            for pair in zip(ours, theirs, strict=True)
        ]
        same = [_same_answers(model, ours, theirs).flatten() for ours, theirs in pairs]
        results[name] = ExportedStudent(
            folder=folder,
            max_difference=max((ours - theirs).abs().max().item() for ours, theirs in pairs),
            agreement=None if _is_regression(model) else torch.cat(same).double().mean().item(),
            megabytes=sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 1e6,
            p50_ms=times[name],
            student_p50_ms=times["student"],
            threads=threads,
        )
    return results


def _is_regression(model: PreTrainedModel) -> bool:
    problem = getattr(model.config, "problem_type", None)
    return problem == "regression" or (
        problem is None and model.config.num_labels == 1 and type(model).__name__.endswith("Classification")
    )


def _same_answers(model: PreTrainedModel, ours: Tensor, theirs: Tensor) -> Tensor:
    """Whether both answer alike, at each position."""
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        return ((ours > 0) == (theirs > 0)).all(-1)
    return ours.argmax(-1) == theirs.argmax(-1)


def refuse_wrong(model: PreTrainedModel, result: ExportedStudent, batches: list[dict[str, Tensor]]) -> None:
    """Refuse a float32 graph that answers otherwise than the student.

    Raises:
        ValueError: If its logits differ by more than rounding explains.
    """
    with torch.inference_mode():
        scale = max(logits.abs().max().item() for batch in batches for logits in _logits(model(**batch)))
    if not result.max_difference <= _TOLERANCE * max(1.0, scale):  # NaN is wrong too
        raise ValueError(
            f"The exported {type(model).__name__} answers otherwise than the student: logits differ by "
            f"{result.max_difference:.2g}, up to {_TOLERANCE * max(1.0, scale):.2g} was expected. Nothing was written."
        )


def session(path: Path, threads: int) -> Callable[[Batch], list[Tensor]]:
    """A function from a batch to the graph's logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs() if entry.name.endswith("logits")]

    def run(batch: Batch) -> list[Tensor]:
        answer = session.run(outputs, {name: batch[name].numpy() for name in inputs})
        return [torch.from_numpy(logits) for logits in answer]

    return run


def _logits(outputs: Any) -> list[Tensor]:
    return [value for name, value in outputs.items() if name.endswith("logits")]


def _times(
    models: Mapping[str, Callable[[Batch], Any]], rows: list[dict[str, Tensor]], runs: int, threads: int
) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that the machine's moods meet all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for run in range(_WARMUP + runs):
            for name, model in models.items():
                start = time.perf_counter()
                model(rows[run % len(rows)])
                times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(before)
    return {name: median(values[_WARMUP:]) for name, values in times.items()}
