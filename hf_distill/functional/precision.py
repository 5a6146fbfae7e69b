"""What every formula owes its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32; float64 stays float64, so that gradients can be checked.

    Shape:
        (...) -> (...).

    >>> at_least_fp32(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def require_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse to broadcast.

    Raises:
        ValueError: If the shapes differ.
    """
    # Broadcasting (B, 1, H) against (B, T, H) would silently average over the wrong thing.
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}. "
            "Compare the same positions and classes (Batch.predictions); project hidden states to one width "
            "(hf_distill.projection.Projection)."
        )
