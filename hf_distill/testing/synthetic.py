"""Activations of every kind of head, made up; and the same padded, cut, masked or in another precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_distill.activations import QKV, Activations, Head
from hf_distill.unprojected import materialised


def synthetic(kind: str) -> tuple[dict[str, Tensor], Activations, Activations, Head]:
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


def padded(kind: str, inputs: Any, student: Activations, teacher: Activations) -> tuple[Any, Activations, Activations]:
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


def rows(part: slice, inputs: Any, student: Activations, teacher: Activations) -> tuple[Any, Activations, Activations]:
    """Some of the rows alone."""

    def cut(a: Activations) -> Activations:
        states, maps = ({k: h[part] for k, h in tensors.items()} for tensors in (a.hidden_states, a.attentions))
        return Activations(a.logits[part], states, maps, a.stack, _qkv(a, lambda x: x[part]))  # type: ignore[index]

    return {key: v[part] for key, v in inputs.items()}, cut(student), cut(teacher)


def masked(key: str, value: Tensor) -> Tensor:
    """An input without labels."""
    if key in ("labels", "start_positions", "end_positions"):
        return torch.full_like(value, -100)
    return value


def cast(activations: Activations, dtype: torch.dtype) -> Activations:
    """The same in another precision."""
    logits: Any = activations.logits
    states, maps = (
        {k: h.to(dtype) for k, h in tensors.items()} for tensors in (activations.hidden_states, activations.attentions)
    )
    return Activations(logits.to(dtype), states, maps, activations.stack, _qkv(activations, lambda x: x.to(dtype)))


def _qkv(activations: Activations, change: Callable[[Tensor], Tensor]) -> dict[int, QKV]:
    return {index: (change(q), change(k), change(v)) for index, (q, k, v) in activations.qkv.items()}


def tensors(activations: Activations) -> list[Any]:
    """All that a gradient may reach."""
    vectors = [x for three in activations.qkv.values() for x in three]
    return [activations.logits, *activations.hidden_states.values(), *activations.attentions.values(), *vectors]
