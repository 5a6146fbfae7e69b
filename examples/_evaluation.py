"""What the lines of the table are made of: answers on the test rows, size and speed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from _counts import tfidf
from _results import Result
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.reports.measure import count_parameters, disk_megabytes, measure_latency


def score(result: Result, answer: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> None:
    """Add one model's test answers (class indices) to its line of the table."""
    result.accuracy.append((answer == labels).double().mean().item())
    result.retention.append(result.accuracy[-1] / (teacher == labels).double().mean().item())
    result.agreement.append((answer == teacher).double().mean().item())


def measure(
    result: Result,
    model: PreTrainedModel,
    folder: Path,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Size and speed of a saved model, into its line of the table; always timed on the CPU."""
    sentences = data["test"]["text"][:100]
    limit = max(map(len, data["test"]["input_ids"]))
    batches = [dict(tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")) for text in sentences]
    result.parameters = count_parameters(model)
    result.megabytes = disk_megabytes(folder)
    result.latency_ms = measure_latency(model.cpu(), batches, runs=200).p50_ms


def tfidf_baseline(data: DatasetDict, teacher: torch.Tensor) -> Result | None:
    """Word counts and a linear model, for scale; `None` where scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        print("No line for TF-IDF: it needs `pip install scikit-learn`.")
        return None
    found, size = tfidf(data["train"]["text"][:], np.asarray(data["train"]["label"][:]), data["test"]["text"][:])
    result, answer = Result("TF-IDF + logistic regression", [], parameters=size), torch.from_numpy(found)
    score(result, answer, torch.tensor(data["test"]["label"]), teacher)
    return result
