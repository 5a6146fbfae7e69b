"""A teacher's answers about its own tokens as answers about the student's, where the two have different tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.activations import MASKED_LOGIT, TEACHER_POSITIONS, Activations
from hf_distill.unprojected import materialised


def on_student_tokens(teacher: Activations, inputs: Mapping[str, Any]) -> Activations:
    """The teacher's activations, its logits at the student's tokens; as they are where the batch aligns no tokens.

    In token classification each position of the student gets the logits of the teacher's position that stands there in
    `teacher_positions` (B, T_student); where that is -1, the position is not compared. For spans the probability of
    each token of the teacher goes to the student's token that stands in `teacher_positions` (B, 2, T_teacher), start
    and end; several of them add up, and what has no token there is left out.

    Shape:
        tokens: (B, T_teacher, V) -> (B, T_student, V). span: (B, 2, T_teacher) -> (B, 2, T_student).
    """
    positions = inputs.get(TEACHER_POSITIONS)
    if positions is None or teacher.logits is None:
        return teacher
    logits = materialised(teacher.logits)
    if positions.ndim == 3:
        return replace(teacher, logits=_moved(logits, positions, inputs["input_ids"].shape[1]))
    index = positions.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1])
    return replace(teacher, logits=logits.gather(1, index))


def _moved(logits: Tensor, positions: Tensor, length: int) -> Tensor:
    """The logarithms of the probabilities at their new positions. Shape: (..., T), (..., T) -> (..., length)."""
    known = positions >= 0
    # In float64, where even the least of probabilities that fp32 logits stand for is not 0.
    probabilities = logits.double().masked_fill(~known, MASKED_LOGIT).softmax(-1) * known
    moved = torch.zeros(*logits.shape[:-1], length, dtype=torch.float64, device=logits.device)
    moved = moved.scatter_add(-1, positions.clamp(min=0), probabilities)
    return moved.log().clamp(min=MASKED_LOGIT).to(logits.dtype)
