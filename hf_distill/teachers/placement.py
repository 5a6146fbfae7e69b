"""Where a model is, and whether it may be moved: quantised, spread by `device_map`, or offloaded."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn


def stays_where_it_is(model: nn.Module) -> bool:
    """Whether a model must not be moved: Accelerate or its quantiser has put it where it runs.

    A model from a GGUF file counts as quantised even where Transformers has unpacked all of it into plain weights;
    that one moves like any other.
    """
    if getattr(model, "hf_device_map", None) is not None:
        return True
    if not getattr(model, "is_quantized", False):
        return False
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return method != "gguf" or not all(p.is_floating_point() for p in model.parameters())


def execution_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; the meta device never is, though offloaded weights wait there."""
    hook: Any = getattr(model, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    placed = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(placed, torch.device("cpu"))


def real_tensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model's state dict itself, fetched for the moment if it is offloaded.

    Raises:
        ValueError: If it is on the meta device, and nothing says where its values are.
    """
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not has_offloaded_params(module):
        raise ValueError(
            f"{name} of the teacher is on the meta device, without values, so the teacher cannot be recognised. Load "
            "it with from_pretrained, or leave out teacher_cache_dir."
        )
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, leaf).detach().clone()
