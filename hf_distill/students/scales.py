"""Numbers that follow the width: what norms divide by, and what some models multiply their word embeddings by."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.students.spaces import UnprovedError, is_norm

_FINAL_NORMS = ("norm", "final_layer_norm", "layer_norm", "ln_f")  # before a language model's head


def keep_norms(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Root mean squares are now over fewer features: what is left out shall count as zero, not as the others' mean."""
    theirs = dict(teacher.named_modules())
    for name, module in student.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not is_norm(module) or weight.shape == theirs[name].weight.shape:
            continue
        probe = copy.deepcopy(theirs[name]).double().cpu()
        x = torch.linspace(-1, 2, theirs[name].weight.shape[0]).double()
        with torch.no_grad():
            scales = not torch.allclose(probe(x + 3), probe(x)) and torch.allclose(probe(100 * x), probe(10 * x), 1e-3)
        if scales:
            _multiply(module, (len(x) / len(weight)) ** 0.5)


def keep_embedding_scale(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Word embeddings that a model multiplies by the root of its width (Gemma, BioGPT) are as large as the teacher's.

    The factor is no weight: a student that is read from its folder has that of its own width.

    Raises:
        UnprovedError: If it is not known what is multiplied.
    """
    theirs = dict(teacher.named_modules())
    if getattr(teacher.config, "rescale_embeddings", False):
        raise UnprovedError(f"{type(teacher).__name__} multiplies embeddings by the root of its width.")  # BigBird
    if not any(_scale(module) is not None for module in theirs.values()):
        return
    with torch.random.fork_rng(), init_empty_weights(include_buffers=False):
        fresh = dict(type(student)._from_config(student.config).named_modules())
    for name, module in student.named_modules():
        before, after = _scale(theirs[name]), _scale(fresh[name])
        if before is None or after is None or before == after:
            continue
        if isinstance(module.embed_scale, Tensor):
            module.embed_scale.fill_(after)  # not saved, so that `resized` copied the teacher's
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise UnprovedError(f"{type(teacher).__name__} multiplies by {name}.embed_scale, which follows its width.")
        module.weight.data.mul_(before / after)
        head: Any = student.get_output_embeddings()
        if head is not None and head.weight is module.weight:
            base = student.base_model
            known = [getattr(base, name) for name in _FINAL_NORMS if isinstance(getattr(base, name, None), nn.Module)]
            norm = next(filter(is_norm, known), None)
            if norm is None:
                raise UnprovedError(f"{type(teacher).__name__} has no known norm before its tied head.")
            _multiply(norm, after / before)


def _scale(module: nn.Module) -> float | None:
    value = getattr(module, "embed_scale", None)
    return float(value) if isinstance(value, (int, float, Tensor)) else None


def _multiply(norm: nn.Module, ratio: float) -> None:
    """Scale a norm's outputs."""
    weight: Any = norm.weight
    probe: Any = copy.deepcopy(norm).double().cpu()
    with torch.no_grad():
        probe.weight.zero_()
        if isinstance(getattr(probe, "bias", None), Tensor):
            probe.bias.zero_()
        offset = float(bool(probe(torch.linspace(-1, 2, len(weight)).double()).any()))  # Gemma's weight counts from 1
    weight.data.add_(offset).mul_(ratio).sub_(offset)
    if isinstance(bias := getattr(norm, "bias", None), Tensor):
        bias.data.mul_(ratio)
