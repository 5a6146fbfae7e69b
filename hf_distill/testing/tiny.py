"""Tiny models with data for every supported task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    PreTrainedModel,
    ViTConfig,
)

TASKS: dict[str, Any] = {
    "single_label": AutoModelForSequenceClassification,
    "multi_label": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "image": AutoModelForImageClassification,
}
VOCABULARY = 37
LABELS = ("a", "b", "c")


@dataclass
class TinyTask:
    """A student, a teacher twice as deep and wider, and ragged rows that `collate` batches."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    rows: list[dict[str, Any]]
    collate: PadCollator


class PadCollator:
    """Pads rows of lists on the right; labels with -100, everything else with 0.

    Args:
        extra: How many columns of padding to add beyond the longest row.
    """

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {}
        for key in rows[0]:
            values = [torch.as_tensor(row[key]) for row in rows]
            if values[0].ndim != 1 or (key == "labels" and values[0].is_floating_point()):
                batch[key] = torch.stack(values)  # scalars, multi-hot labels, images
                continue
            fill = -100 if key == "labels" else 0
            padded = pad_sequence(values, batch_first=True, padding_value=fill)
            batch[key] = torch.nn.functional.pad(padded, (0, self.extra), value=fill)
        return batch


def tiny_task(name: str, rows: int = 48, seed: int = 0) -> TinyTask:
    """Models of a few thousand parameters without dropout, and rows of 3 to 12 tokens (8x8 images for `"image"`).

    Args:
        name: One of `TASKS`.
        rows: How many rows of data.
        seed: Of weights and data.

    Raises:
        ValueError: If there is no such task.

    >>> task = tiny_task("token", rows=4)
    >>> task.student.config.hidden_size, task.teacher.config.hidden_size
    (16, 24)
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {list(TASKS)}, got {name!r}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = TASKS[name].from_config(_config(name, layers=2, width=16))
        teacher = TASKS[name].from_config(_config(name, layers=4, width=24))
        for model in (student, teacher):
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)  # confident enough for divergences to matter
        data = [_row(name) for _ in range(rows)]
    return TinyTask(student, teacher, data, PadCollator())


def _config(name: str, layers: int, width: int) -> Any:
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    if name == "regression":
        labels = {"num_labels": 1}
    if name == "question_answering":
        labels = {}
    if name == "multi_label":
        labels["problem_type"] = "multi_label_classification"
    if name == "causal_lm":
        sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 32}
        no_dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes, **no_dropout)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "image":
        return ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes, **no_dropout, **labels)
    return BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes, **no_dropout, **labels)


def _row(name: str) -> dict[str, Any]:
    if name == "image":
        return {"pixel_values": torch.randn(1, 8, 8), "labels": _one_of(3)}
    length = 3 + _one_of(10)
    ids = [5 + _one_of(VOCABULARY - 5) for _ in range(length)]
    row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
    if name == "single_label":
        return row | {"labels": _one_of(3)}
    if name == "multi_label":
        return row | {"labels": [float(_one_of(2)) for _ in LABELS]}
    if name == "regression":
        return row | {"labels": torch.randn(()).item()}
    if name == "token":
        return row | {"labels": [_one_of(3) if _one_of(4) else -100 for _ in range(length)]}
    if name == "question_answering":
        return row | {"start_positions": _one_of(length), "end_positions": _one_of(length)}
    if name == "masked_lm":
        masked = [_one_of(3) == 0 for _ in ids]
        labels = [token if mask else -100 for token, mask in zip(ids, masked, strict=True)]
        return row | {
            "input_ids": [4 if mask else token for token, mask in zip(ids, masked, strict=True)],
            "labels": labels,
        }
    return row | {"labels": [token if _one_of(4) else -100 for token in ids]}


def _one_of(n: int) -> int:
    return int(torch.randint(n, ()))
