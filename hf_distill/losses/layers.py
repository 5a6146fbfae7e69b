"""Reading mapped layers: one teacher layer or the average of several, sequences or feature maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_distill.functional import at_least_fp32
from hf_distill.mapping import Teachers, layers_of

Pairs = tuple[tuple[int, Teachers], ...]


def student_layers(pairs: Pairs) -> tuple[int, ...]:
    """All student layers of the pairs, in order."""
    return tuple(sorted(student for student, _ in pairs))


def teacher_layers(pairs: Pairs) -> tuple[int, ...]:
    """All teacher layers of the pairs, in order."""
    return tuple(sorted(index for _, teachers in pairs for index in layers_of(teachers)))


def averaged(tensors: Mapping[int, Tensor], teachers: Teachers, select: Callable[[Tensor], Tensor]) -> Tensor:
    """What `select` keeps of the teacher's side of a pair; where that is several layers, their average in fp32."""
    layers = layers_of(teachers)
    if len(layers) == 1:
        return select(tensors[layers[0]])
    return torch.stack([at_least_fp32(select(tensors[index])) for index in layers]).mean(0)


def require_one_shape(teachers: Teachers, shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Refuse layers that are not known, and to average layers of different shape.

    Raises:
        ValueError: If one is unknown, or their shapes differ.
    """
    layers = layers_of(teachers)
    for index in layers:
        if not shapes[index]:
            raise ValueError(
                f"layer_mapping names the teacher's layer {index}, which no column of the data holds, and there is no "
                "teacher_model to ask. Name the stored layers by an explicit layer mapping, or pass the teacher."
            )
    if len({shapes[index] for index in layers}) > 1:
        raise ValueError(
            f"layer_mapping averages the teacher layers {layers}, but their shapes differ: "
            f"{[shapes[index] for index in layers]}. Average layers of one shape."
        )


def width(shape: tuple[int, ...]) -> int:
    """H of a hidden state (B, T, H) or a feature map (B, H, height, width)."""
    return shape[1] if len(shape) == 4 else shape[-1]


def vectors(x: Tensor) -> Tensor:
    """Feature maps (B, H, height, width) as (B, T, H); sequences stay as they are."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
