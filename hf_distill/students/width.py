"""A narrower model: fewer features, feed-forward units and heads, the important ones kept with their weights."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.students.build import Kept, built, resized, tensors
from hf_distill.students.importance import importance
from hf_distill.students.layouts import Kind, Space
from hf_distill.students.scales import keep_embedding_scale, keep_norms
from hf_distill.students.shapes import heads_of, narrowed_entries
from hf_distill.students.spaces import Prober, UnprovedError, axes_of, unchanged

Model = TypeVar("Model", bound=PreTrainedModel)


def narrow(teacher: Model, widths: Mapping[str, int], calibration: Iterable[Mapping[str, Tensor]] | None) -> Model:
    """The teacher with narrower axes, those of one space cut at the same places.

    Which axes belong together is found by trial (`spaces.py`) and proved on the teacher's own weights: permuting one
    space everywhere must leave its outputs unchanged. What is kept is chosen by `importance`.

    Args:
        teacher: The model; it is left as it is.
        widths: New values of `hidden_size`, `intermediate_size`, `num_attention_heads`, `num_key_value_heads`.
        calibration: Batches of the model's inputs to measure activations on; weights alone decide if `None`.

    Raises:
        ValueError: If the widths do not fit the model or each other.
        UnprovedError: If the teacher's axes cannot be cut without guessing.
    """
    entries = narrowed_entries(teacher, widths)
    heads, new_heads = heads_of(teacher, teacher.config.to_dict()), heads_of(teacher, entries)
    ours, theirs = dict(tensors(built(teacher, entries))), dict(tensors(teacher))
    if ours.keys() != theirs.keys():
        raise UnprovedError(_unproved(teacher, f"has other tensors ({min(ours.keys() ^ theirs.keys())})"))
    cut = {
        (name, axis): new
        for name, tensor in theirs.items()
        for axis, (old, new) in enumerate(zip(tensor.shape, ours[name].shape, strict=True))
        if old != new
    }
    if not cut:
        return resized(teacher, entries, {})
    prober = Prober(teacher, sample_inputs(teacher))
    spaces = _spaces(teacher, prober, cut, heads, new_heads)
    if not unchanged(teacher, prober, [space for space, _ in spaces]):
        raise UnprovedError(_unproved(teacher, "changes its outputs when a space is permuted"))
    scores = importance(teacher, prober, [space for space, _ in spaces], calibration)
    kept = _kept(teacher, prober, [(space, part, score) for (space, part), score in zip(spaces, scores, strict=True)])
    for name, axis in cut:
        if len(kept.get(name, {}).get(axis, ())) != cut[name, axis]:
            raise UnprovedError(_unproved(teacher, f"has no known order on axis {axis} of {name}"))
    student = resized(teacher, entries, kept)
    keep_norms(student, teacher)
    keep_embedding_scale(student, teacher)
    return student


def sample_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A few made-up inputs.

    Raises:
        UnprovedError: If the model reads neither text nor images.
    """
    config: Any = model.config
    arguments = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (1, config.num_channels, config.image_size, config.image_size)
        inputs: dict[str, Any] = {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}
    elif model.main_input_name == "input_ids":
        ids = torch.randint(0, config.vocab_size, (1, 9), generator=generator)
        inputs = {"input_ids": ids[None] if "MultipleChoice" in type(model).__name__ else ids}
    else:
        raise UnprovedError(_unproved(model, f"reads {model.main_input_name}, neither text nor images"))
    return inputs | ({"use_cache": False} if "use_cache" in arguments else {}) | {"return_dict": True}


def _spaces(
    teacher: PreTrainedModel,
    prober: Prober,
    cut: Mapping[tuple[str, int], int],
    heads: Mapping[str, int],
    new_heads: Mapping[str, int],
) -> list[tuple[Space, float]]:
    """The spaces of all axes that must be cut, and which part of each is kept."""
    found: list[tuple[Space, float]] = []
    habits: dict[str, list[str]] = {}
    shapes = {name: tensor.shape for name, tensor in tensors(teacher)}
    for port in [*dict.fromkeys(name for name, _, _ in prober.calls), *prober.loose]:
        for name, axis in port_axes(prober, port):
            if (name, axis) not in cut:
                continue
            having = [(space, part) for space, part in found if (name, axis) in covered(prober, [space])]
            wanted = cut[name, axis] / shapes[name][axis]
            if abs(math.prod(part for _, part in having) - wanted) < 1e-9:
                continue
            names = {space.kind.name for space, _ in having}
            options = [
                [(kind, part) for kind, part in option if kind.name not in names]
                for option in _kinds(prober.size(port), wanted, heads, new_heads)
                if not names or names <= {kind.name for kind, _ in option}
            ]
            pattern = re.sub(r"\d+", "#", port)
            # Queries and keys are tried by heads first, which is quick; free first is what others need.
            tries = [(option, False) for option in options]
            by_head = [(option, True) for option in options if option and option[0][0].name != "free"]
            tries = sorted([*by_head, *tries], key=lambda t: [k.name for k, _ in t[0]] != habits.get(pattern))
            new = next(filter(None, (_found(prober, port, *each) for each in tries)), None)
            if new is None:
                raise UnprovedError(_unproved(teacher, f"has no known order of the outputs of {port}"))
            habits[pattern] = [space.kind.name for space, _ in new]
            found += new
    return found


def _found(
    prober: Prober, port: str, option: Iterable[tuple[Kind, float]], several: bool
) -> list[tuple[Space, float]] | None:
    """The spaces of a port for each kind, if there are; with `several` only those of several outputs."""
    spaces = []
    for kind, part in option:
        space = prober.find(port, kind)
        if space is None or (several and len(space.outputs) == 1 and space.outputs[port].chunks == 1):
            return None
        spaces.append((space, part))
    return spaces


def _kinds(
    size: int, part: float, heads: Mapping[str, int], new_heads: Mapping[str, int]
) -> list[list[tuple[Kind, float]]]:
    """What the outputs of a module may be numbered by: freely, in gated pairs, or by heads and inside them."""
    free, pairs = ([(Kind("free", width, width), part)] for width in (size, size // 2))
    width = heads["heads"] * heads["size"]
    by_head: list[tuple[Kind, float]] = []
    if new_heads["heads"] != heads["heads"]:
        units = heads["heads"] if heads["groups"] == new_heads["groups"] == 1 else heads["groups"]
        shared = heads["groups"] * heads["size"] if heads["groups"] > 1 else width
        sizes = (width, 3 * width, heads["heads"], shared)
        by_head.append((Kind("heads", units, width, sizes=sizes), new_heads["heads"] / heads["heads"]))
    if new_heads["size"] != heads["size"]:
        by_head.append((Kind("inside", width, width, heads["heads"]), new_heads["size"] / heads["size"]))
    by_head = by_head[:1] if size == heads["heads"] else by_head  # one number a head, as of relative positions
    part_by_head = math.prod(share for _, share in by_head)
    fits = by_head and (size % width == 0 or size == heads["heads"]) and abs(part_by_head - part) < 1e-9
    return [free, *([by_head] if fits else []), *([pairs] if size % 2 == 0 and size > 2 else [])]


def port_axes(prober: Prober, port: str, side: str = "outputs") -> list[tuple[str, int]]:
    """The parameters, by name, and their axes that run along a module's output or input; or a loose parameter's."""
    if port in prober.loose:
        return [(port, prober.loose[port].ndim - 1)]
    return [(f"{port}.{key}" if port else key, axis) for key, axis in axes_of(prober.modules[port])[side].items()]


def covered(prober: Prober, spaces: Iterable[Space]) -> set[tuple[str, int]]:
    """All axes of some spaces, under every name that their parameters have."""
    return {(name, axis) for space in spaces for name, axis, _ in prober.members(space)}


def _kept(teacher: PreTrainedModel, prober: Prober, chosen: Iterable[tuple[Space, float, Tensor]]) -> Kept:
    """The indices kept of every axis: those whose unit is kept in each space that the axis belongs to."""
    shapes = {name: tensor.shape for name, tensor in tensors(teacher)}
    masks: dict[tuple[str, int], Tensor] = {}
    for space, part, score in chosen:
        kind = space.kind
        inside = kind.units // kind.groups
        number = round(inside * part)
        best = score.view(kind.groups, inside).argsort(dim=1, descending=True, stable=True)[:, :number]
        units = torch.zeros(kind.groups, inside, dtype=torch.bool).scatter_(1, best, True).flatten()
        for name, axis, layout in prober.members(space):
            size = shapes[name][axis]
            mask = layout.mask(units, size)
            masks[name, axis] = masks.get((name, axis), torch.ones(size, dtype=torch.bool)) & mask
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, axis), mask in masks.items():
        kept.setdefault(name, {})[axis] = mask.nonzero().flatten()
    return kept


def _unproved(teacher: PreTrainedModel, what: str) -> str:
    return (
        f"{type(teacher).__name__} cannot be made narrower with its weights: it {what}. Cut its depth and vocabulary "
        "only, or train a student of another config from random weights."
    )
