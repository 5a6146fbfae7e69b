"""Which features, units and heads of a model matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.heads import forward_inputs, in_eval_mode
from hf_distill.students.layouts import Space
from hf_distill.students.spaces import Prober, axes_of


def importance(
    teacher: PreTrainedModel,
    prober: Prober,
    spaces: Sequence[Space],
    calibration: Iterable[Mapping[str, Tensor]] | None,
) -> list[Tensor]:
    """A score of each unit of each space; 0 for one that contributes nothing.

    A linear map that reads unit `u` uses `mean |x_u| * ||W[:, u]||` of it (the mean over rows and positions of the
    calibration batches, as Minitron, with the weight it meets, as Wanda). Without calibration the norm of the weights
    that make the unit stands for `mean |x_u|`. Scores of several maps are divided by their sums and added. Where no
    map reads a unit (inside heads, queries meet keys) it is the product of the norms that make it.

    References:
        Muralidharan et al. (2024), Compact Language Models via Pruning and Knowledge Distillation, §2.2. Sun et al.
        (2024), A Simple and Effective Pruning Approach for Large Language Models, equation 1.
    """
    readers = {
        name for space in spaces for name in space.inputs if "weight" in axes_of(prober.modules[name])["inputs"]
        and axes_of(prober.modules[name])["outputs"]
    }  # fmt: skip
    activations = _activations(teacher, readers, calibration) if calibration is not None else {}
    return [_scores(teacher, prober, space, readers, activations) for space in spaces]


def _scores(
    teacher: PreTrainedModel, prober: Prober, space: Space, readers: set[str], activations: Mapping[str, Tensor]
) -> Tensor:
    modules = dict(teacher.named_modules())
    made = torch.ones(space.kind.units, dtype=torch.float64)
    product = made.clone()
    norms = []
    for port, layout in space.outputs.items():
        if port not in prober.modules:
            continue
        norm = sum(
            _power(getattr(modules[port], key), axis) for key, axis in axes_of(prober.modules[port])["outputs"].items()
        )
        norms.append(layout.gather(torch.as_tensor(norm), space.kind.units).sqrt())
        product = product * norms[-1]
    if norms:
        made = torch.stack([norm / norm.sum().clamp(min=1e-300) for norm in norms]).sum(0)
    total = torch.zeros_like(made)
    found = False
    for port, layout in space.inputs.items():
        if port not in readers:
            continue
        found = True
        norm = _power(modules[port].weight, axes_of(prober.modules[port])["inputs"]["weight"]).sqrt()
        use = norm * activations[port] if port in activations else norm
        score = layout.gather(use, space.kind.units)
        score = score if port in activations else score * made
        total = total + score / score.sum().clamp(min=1e-300)
    return total if found else product


def _power(weight: Any, axis: int) -> Tensor:
    """The sum of squares at each index of an axis."""
    squares = weight.detach().to("cpu", torch.float64).square()
    return squares.sum([other for other in range(squares.ndim) if other != axis]) if squares.ndim > 1 else squares


def _activations(
    teacher: PreTrainedModel, readers: Iterable[str], calibration: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean absolute input of some modules at each feature, over the rows and positions that are no padding."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    real: list[Tensor | None] = [None]

    def hook(name: str) -> Any:
        def see(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            value = arguments[0].detach().abs().double().cpu()
            mask = real[0]
            if mask is not None and value.ndim > mask.ndim and value.shape[: mask.ndim] == mask.shape:
                value = value[mask]
            value = value.flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(value.shape[-1], dtype=torch.float64)) + value.sum(0)
            counts[name] = counts.get(name, 0) + len(value)

        return see

    modules = dict(teacher.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in readers]
    try:
        with in_eval_mode(teacher), torch.no_grad():
            for batch in calibration:
                mask = batch.get("attention_mask")
                real[0] = mask.bool().cpu() if isinstance(mask, Tensor) else None
                teacher(**forward_inputs(teacher, batch))
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError("calibration holds no batch. Pass a list of the model's inputs, or leave it out.")
    return {name: total / counts[name] for name, total in sums.items()}
