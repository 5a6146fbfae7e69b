"""For tests of your own: tiny models with data for every supported task, and a check of any loss.

Nothing here is imported by the rest of the package.
"""

from __future__ import annotations

from collections.abc import Callable
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

from hf_distill.activations import QKV, Activations, Head
from hf_distill.batch import Batch
from hf_distill.losses import DistillationLoss
from hf_distill.unprojected import materialised

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
KINDS = ("rows", "multi_label", "regression", "tokens", "causal_lm", "span")
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


def check_loss(
    loss: DistillationLoss,
    kinds: tuple[str, ...] | None = None,
) -> None:
    """Check what every loss owes the trainer, on synthetic activations of every kind of head.

    That it is one finite number, with a gradient for the student and none for the teacher; that padding changes
    nothing; that micro-batches add up to the batch (unless it couples rows); that a single row is finite; that an
    all-masked batch is a finite zero that still has a gradient; and that bf16 activations give nearly the same.

    Args:
        loss: A loss; `setup` and `fit` are called here.
        kinds: The heads it is for, of `KINDS`; all but those that it says it is undefined for if left out.

    Raises:
        AssertionError: If a property does not hold; the message names it.

    >>> from hf_distill.losses import SoftTargetLoss
    >>> check_loss(SoftTargetLoss(temperature=2.0))
    """
    checked = 0
    for kind in KINDS if kinds is None else kinds:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs, student, teacher, head = _synthetic(kind)
            if kinds is None and set(head.traits(Batch.from_inputs(inputs, head).problem)) & set(loss.undefined_for):
                continue
            loss.setup(student.shapes(), teacher.shapes())
            loss.fit([(student, teacher, Batch.from_inputs(inputs, head))])
            _check_kind(loss, kind, inputs, student, teacher, head)
            checked += 1
    if not checked:
        raise AssertionError(f"{type(loss).__name__} is undefined for every head: {dict(loss.undefined_for)}.")


def _check_kind(
    loss: DistillationLoss, kind: str, inputs: Any, student: Activations, teacher: Activations, head: Head
) -> None:
    def value(inputs: Any, student: Activations, teacher: Activations, counts: Tensor | None = None) -> Tensor:
        batch = Batch.from_inputs(inputs, head)
        return loss(student, teacher, batch if counts is None else batch.with_counts(counts))

    whole = value(inputs, student, teacher)
    _require(whole.ndim == 0 and bool(whole.isfinite()), kind, f"must return one finite number, got {whole}")
    gradients = torch.autograd.grad(whole, _tensors(student), allow_unused=True, retain_graph=True)
    _require(all(g is None or bool(g.isfinite().all()) for g in gradients), kind, "has a gradient that is not finite")
    _require(
        any(g is not None and bool(g.abs().sum() > 0) for g in gradients), kind, "must give the student a gradient"
    )

    _require(_close(value(*_padded(kind, inputs, student, teacher)), whole), kind, "changes when padding is added")
    counts = Batch.from_inputs(inputs, head).counts()
    if loss.couples_rows:
        share = value(inputs, student, teacher, 2 * counts)
        _require(_close(2 * share, whole), kind, "ignores the window's counts; divide by batch.mean only")
    else:
        halves = [value(*_rows(part, inputs, student, teacher), counts) for part in (slice(0, 2), slice(2, 4))]
        _require(_close(sum(halves), whole), kind, "depends on how the batch is split; divide by batch.mean only")  # type: ignore[arg-type]

    _check_one_row(kind, value(*_rows(slice(0, 1), inputs, student, teacher)), student)

    nothing = {key: torch.zeros_like(v) if key == "attention_mask" else _masked(key, v) for key, v in inputs.items()}
    empty = value(nothing, student, teacher)
    _require(
        bool(empty.isfinite()) and empty.requires_grad,
        kind,
        f"is {empty} when everything is masked; select positions first",
    )

    ours, theirs = _cast(student, torch.bfloat16), _cast(teacher, torch.bfloat16)
    wide = value(inputs, _cast(ours, torch.float32), _cast(theirs, torch.float32))  # the same numbers, held in fp32
    _require(_close(value(inputs, ours, theirs).float(), wide), kind, "computes in bf16; cast to fp32 first")


def _check_one_row(kind: str, alone: Tensor, student: Activations) -> None:
    """Relations between rows have nothing to compare here; a variance or a distance of 0 makes NaN."""
    _require(bool(alone.isfinite()) and alone.requires_grad, kind, f"is {alone} on a single row")
    gradients = [g for g in torch.autograd.grad(alone, _tensors(student), allow_unused=True) if g is not None]
    _require(all(bool(g.isfinite().all()) for g in gradients), kind, "has no finite gradient on a single row")


def _synthetic(kind: str) -> tuple[dict[str, Tensor], Activations, Activations, Head]:
    """Four rows of up to five tokens, three classes, widths 4 and 6."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    ids = torch.randint(1, 3, (4, 5)) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    problems = {"multi_label": "multi_label_classification", "regression": "regression"}
    heads = {"rows", "multi_label", "regression"}
    head = Head(
        kind="rows" if kind in heads else kind,  # type: ignore[arg-type]
        num_labels=1 if kind == "regression" else 3,
        problem_type=problems.get(kind),
    )
    if kind == "rows":
        inputs["labels"] = torch.tensor([0, 2, 1, 0])
    elif kind == "multi_label":
        inputs["labels"] = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]])
    elif kind == "regression":
        inputs["labels"] = torch.randn(4)
    elif kind == "span":
        inputs |= {"start_positions": torch.tensor([0, 1, 3, 0]), "end_positions": torch.tensor([4, 2, 3, 1])}
    else:
        inputs["labels"] = ids.masked_fill(mask == 0, -100)

    def activations(width: int) -> Activations:
        shape = (4, 1 if kind == "regression" else 3) if kind in heads else (4, 2, 5) if kind == "span" else (4, 5, 3)
        logits = materialised(head.at_positions(2 * torch.randn(shape), inputs)).requires_grad_()
        states = {index: torch.randn(4, 5, width, requires_grad=True) for index in range(3)}
        keys = mask[:, None, None, :].bool().expand(4, width // 2, 5, 5)
        scores = torch.randn(4, width // 2, 5, 5).masked_fill(~keys, float("-inf"))
        maps = {index: scores.softmax(-1).requires_grad_() for index in (1, 2)}
        qkv = {index: tuple(torch.randn(4, width // 2, 5, 2, requires_grad=True) for _ in "qkv") for index in (1, 2)}
        return Activations(logits, states, maps, head.stack, qkv)  # type: ignore[arg-type]

    return inputs, activations(4), activations(6), head


def _padded(
    kind: str, inputs: Any, student: Activations, teacher: Activations
) -> tuple[Any, Activations, Activations]:
    """Two more columns of padding, holding values that must not matter."""
    fill = {"labels": -100}
    wider = {
        key: torch.nn.functional.pad(v, (0, 2), value=fill.get(key, 0)) if v.shape == inputs["input_ids"].shape else v
        for key, v in inputs.items()
    }

    def pad(activations: Activations) -> Activations:
        logits: Tensor = activations.logits  # type: ignore[assignment]
        if kind in ("tokens", "masked_lm", "causal_lm"):
            logits = torch.cat([logits, torch.full((4, 2, logits.shape[2]), float("nan"))], dim=1)
        elif kind == "span":
            logits = torch.nn.functional.pad(logits, (0, 2), value=-1e4)
        states = {
            k: torch.cat([h, torch.full((4, 2, h.shape[2]), float("nan"))], 1)
            for k, h in activations.hidden_states.items()
        }
        maps = {  # padded keys get no attention, padded queries attend to anything
            k: torch.cat([torch.nn.functional.pad(m, (0, 2)), torch.full((4, m.shape[1], 2, 7), float("nan"))], 2)
            for k, m in activations.attentions.items()
        }
        qkv = _qkv(activations, lambda x: torch.cat([x, torch.full((4, x.shape[1], 2, 2), float("nan"))], 2))
        return Activations(logits, states, maps, activations.stack, qkv)

    return wider, pad(student), pad(teacher)


def _rows(
    part: slice, inputs: Any, student: Activations, teacher: Activations
) -> tuple[Any, Activations, Activations]:
    def cut(a: Activations) -> Activations:
        states, maps = ({k: h[part] for k, h in tensors.items()} for tensors in (a.hidden_states, a.attentions))
        return Activations(a.logits[part], states, maps, a.stack, _qkv(a, lambda x: x[part]))  # type: ignore[index]

    return {key: v[part] for key, v in inputs.items()}, cut(student), cut(teacher)


def _masked(key: str, value: Tensor) -> Tensor:
    if key in ("labels", "start_positions", "end_positions"):
        return torch.full_like(value, -100)
    return value


def _cast(activations: Activations, dtype: torch.dtype) -> Activations:
    logits: Any = activations.logits
    states, maps = (
        {k: h.to(dtype) for k, h in tensors.items()} for tensors in (activations.hidden_states, activations.attentions)
    )
    return Activations(logits.to(dtype), states, maps, activations.stack, _qkv(activations, lambda x: x.to(dtype)))


def _qkv(activations: Activations, change: Callable[[Tensor], Tensor]) -> dict[int, QKV]:
    return {index: (change(q), change(k), change(v)) for index, (q, k, v) in activations.qkv.items()}


def _tensors(activations: Activations) -> list[Any]:
    vectors = [x for three in activations.qkv.values() for x in three]
    return [activations.logits, *activations.hidden_states.values(), *activations.attentions.values(), *vectors]


def _close(a: Tensor, b: Tensor, relative: float = 1e-5) -> bool:
    return bool((a - b).abs() <= relative * b.abs() + 1e-7)


def _require(condition: bool, kind: str, what: str) -> None:
    if not condition:
        raise AssertionError(f"On a head of kind {kind!r} the loss {what}.")
