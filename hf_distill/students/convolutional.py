"""Narrower convolutional students: networks of stages whose widths stand in `hidden_sizes` (ResNet, ConvNeXt)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hf_distill.students.budget import SLACK, NoShapeError, count
from hf_distill.students.build import built, tensors

Model = TypeVar("Model", bound=PreTrainedModel)
_NARROWEST = 4  # a bottleneck is a quarter as wide


def has_stages(teacher: PreTrainedModel) -> bool:
    """Whether the config lists a width and a depth for each stage, and no attention heads that widths must fit."""
    entries = teacher.config.to_dict()
    lists = all(isinstance(entries.get(name), (list, tuple)) for name in ("hidden_sizes", "depths"))
    return lists and "num_attention_heads" not in entries


def narrow_stages(teacher: Model, budget: int) -> Model:
    """The teacher with narrower stages, all of them by one factor and as deep as before.

    Of every tensor the first channels are carried over, the same ones everywhere they meet. So the student computes
    what the teacher would if the other channels were zero (under batch norms; layer norms then see other means). Where
    the student has a tensor that the teacher lacks it keeps its own random weights.

    Args:
        teacher: The model; it is left as it is.
        budget: The most parameters; at least 95 % of them are used.

    Raises:
        ValueError: If there are no such widths.
    """
    entries = teacher.config.to_dict()
    widths = [entries["hidden_sizes"], [entries["embedding_size"]] if "embedding_size" in entries else []]
    whole = [*widths[0], *widths[1]]
    step = entries.get("groups_width") or 1
    chosen = _fit(teacher, whole, budget, step)
    config: Any = type(teacher.config).from_dict(_entries(teacher, chosen))
    config.name_or_path = ""
    student: Any = type(teacher)(config)
    student = student.to(teacher.device, teacher.dtype)
    carried = _carry(student, teacher)
    total = count(student)
    print(f"{total:,} parameters: stages of {list(config.hidden_sizes)} channels, {carried / total:.0%} carried over")
    return student.eval()


def _fit(teacher: PreTrainedModel, whole: list[int], budget: int, step: int) -> list[int]:
    """The widths nearest below the budget: one factor for all, then the widest that still fit grow one by one."""

    def scaled(factor: float) -> list[int]:
        return [min(max(int(width * factor) // step * step, step, _NARROWEST), width) for width in whole]

    def size(widths: list[int]) -> int:
        return count(built(teacher, _entries(teacher, widths)))

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if size(scaled(middle)) <= budget else (low, middle)
    widths = scaled(low)
    for k in sorted(range(len(whole)), key=lambda k: -whole[k]):
        while widths[k] + step <= min(whole[k], scaled(2 * low)[k] + step):
            wider = [*widths[:k], widths[k] + step, *widths[k + 1 :]]
            if size(wider) > budget:
                break
            widths = wider
    found = size(widths)
    if not (1 - SLACK) * budget <= found <= budget:
        raise NoShapeError(
            f"No {type(teacher).__name__} of at most {budget:,} parameters, and at least {1 - SLACK:.0%} of that, "
            f"has narrower stages only; the nearest has {found:,}. Allow another size, or pass "
            "student_config= with fewer layers."
        )
    return widths


def _entries(teacher: PreTrainedModel, widths: list[int]) -> dict[str, Any]:
    """The teacher's config entries with other widths of the stages, and behind them of the stem if it has its own."""
    entries = teacher.config.to_dict()
    stages = len(entries["hidden_sizes"])
    entries["hidden_sizes"] = widths[:stages]
    if "embedding_size" in entries:
        entries["embedding_size"] = widths[stages]
    return entries


@torch.no_grad()
def _carry(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Copy the first channels of every tensor; returns how many parameters were filled."""
    theirs, number = dict(tensors(teacher)), 0
    trained = {name for name, _ in student.named_parameters()}
    for name, tensor in tensors(student):
        source = theirs.get(name)
        if source is None or source.ndim != tensor.ndim:
            continue
        if all(new <= old for new, old in zip(tensor.shape, source.shape, strict=True)):
            tensor.copy_(source[tuple(slice(size) for size in tensor.shape)])
            number += tensor.numel() * (name in trained)
    return number
