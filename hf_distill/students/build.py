"""Putting a smaller model together: its empty shell from config entries, then copies of the teacher's tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# For each tensor, by name, the indices that are kept of each axis that is cut.
Kept = Mapping[str, Mapping[int, Tensor]]


def built(teacher: PreTrainedModel, entries: dict[str, Any]) -> PreTrainedModel:
    """A model of the teacher's class from the entries of a config, without weights, on the meta device."""
    source: Any = teacher.config
    entries = {key: value for key, value in entries.items() if key != "quantization_config"}
    config = type(source).from_dict(entries)
    config.name_or_path = ""  # nobody shall take the student for the teacher
    config.dtype = teacher.dtype
    with torch.device("meta"):
        return type(teacher)._from_config(config, dtype=teacher.dtype, attn_implementation=source._attn_implementation)


def resized(teacher: Any, entries: dict[str, Any], kept: Kept) -> Any:
    """The teacher with some axes cut, built from the entries of its new config.

    Raises:
        ValueError: If a model built from this config is not of the shape that the cuts give.
    """
    student = built(teacher, entries)
    theirs = dict(tensors(teacher))
    ours = dict(tensors(student))
    for name in [*ours, *theirs]:
        shapes = [tuple(tensor.shape) if tensor is not None else None for tensor in (ours.get(name), theirs.get(name))]
        for axis, indices in kept.get(name, {}).items():
            shapes[1] = (*shapes[1][:axis], len(indices), *shapes[1][axis + 1 :]) if shapes[1] else None
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{type(teacher).__name__} with this config has {name} of shape {shapes[0]}, but what is kept of the "
                f"teacher's has shape {shapes[1]}: its config cannot express the cut."
            )
    student = fill(student, teacher, {name: name for name in ours}, kept)
    if student.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers, those that are not saved too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def fill(
    student: PreTrainedModel, teacher: PreTrainedModel, found: Mapping[str, str], kept: Kept | None = None
) -> PreTrainedModel:
    """Put copies of the teacher's tensors into the skeleton, on the teacher's device and in its dtypes.

    Args:
        student: The skeleton.
        teacher: The model whose tensors are copied.
        found: For each tensor of the student the name of the teacher's.
        kept: For tensors of the teacher which indices of which axes are copied; all of the others.

    Raises:
        ValueError: If tensors that the config ties differ in the teacher, or some have been moved off its devices.
    """
    theirs = dict(tensors(teacher))
    placed = {}
    for name, old in list(tensors(student)):
        source = theirs[found[name]].detach()
        packed = type(theirs[found[name]]) not in (Tensor, nn.Parameter)
        if packed or source.is_meta or source.is_floating_point() != old.is_floating_point():
            raise ValueError(
                f"{found[name]} of the teacher is on device {source.device} in {source.dtype}; a student needs plain "
                "floating-point weights. Load the teacher without quantisation or offloading to cut it."
            )
        new = source.to(teacher.device, copy=True)
        for axis, indices in (kept or {}).get(found[name], {}).items():
            new = new.index_select(axis, indices.to(new.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        path, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(path), leaf, new)
        placed[name] = new
    student.tie_weights()
    for name, tensor in tensors(student):
        if tensor is not placed[name] and not torch.equal(tensor, placed[name]):
            raise ValueError(
                f"The teacher's config ties {name} to another weight, but in the teacher the two differ, and the "
                "student would lose one of them. Set teacher.config.tie_word_embeddings = False, or tie_weights()."
            )
    return student
