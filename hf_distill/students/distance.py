"""How far from its teacher a student starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.heads import forward_inputs, head_of, in_eval_mode


@torch.no_grad()
def distance_from_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """What an initialisation keeps, before any training: 0 is everything, 1 is nothing.

    Cutting the width is exact under RMS norms where what is left out is zero, but never under layer norms, whose mean
    and variance become those of the kept features. This tells how much that costs.

    Args:
        student: The student, with the teacher's tokens.
        teacher: The teacher.
        batches: Inputs that both read; padding by `attention_mask` is left out.

    Returns:
        `"logits"`: |student - teacher| / |teacher|, over all answers; a student that answers zero has 1, one that is
        wrong more. `"hidden_states"`: the share of the variance of the teacher's final states that no linear map of
        the student's final states explains.

    Raises:
        ValueError: If the batches hold too few positions to tell: less than four for each feature of the student.

    Example:
        ```python
        student = create_student(teacher, compression=10)
        distance_from_teacher(student, teacher, [tokenizer(texts, padding=True, return_tensors="pt")])
        ```
    """
    with in_eval_mode(student), in_eval_mode(teacher):
        pairs = [(_answers(student, batch), _answers(teacher, batch)) for batch in batches]
    logits, states = (
        [torch.cat([pair[who][what] for pair in pairs]) for who in (0, 1)] if pairs else [torch.zeros(0, 1)] * 2
        for what in (0, 1)
    )
    if len(states[0]) < 4 * states[0].shape[1]:
        raise ValueError(
            f"The batches hold {len(states[0])} positions, too few for the student's {states[0].shape[1]} features. "
            f"Pass at least {4 * states[0].shape[1]}."
        )
    return {
        "logits": float((logits[0] - logits[1]).norm() / logits[1].norm()),
        "hidden_states": unexplained(states[0], states[1]),
    }


def unexplained(inputs: Tensor, targets: Tensor) -> float:
    """Share of the targets' variance that no linear map of the inputs explains.

    Shape:
        (N, H), (N, H') -> ().
    """
    inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
    solution = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    return float((inputs @ solution - targets).square().sum() / targets.square().sum())


def _answers(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and final states, a line a position without padding. Shape: (N, V), (N', H)."""
    inputs, head = forward_inputs(model, batch), head_of(model)
    output = model(**inputs, output_hidden_states=True)
    logits, states = head.answers(output).double().cpu(), output.hidden_states[-1].double().cpu()
    if head.kind == "span":
        logits = logits.transpose(1, 2)  # (B, T, 2)
    mask = inputs.get("attention_mask", torch.ones(states.shape[:2])).bool().cpu()
    if states.ndim == 4:  # (B, C, height, width)
        states = states.flatten(2).transpose(1, 2)
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
    return (logits[mask] if logits.ndim == 3 else logits), states[mask[:, : states.shape[1]]]
