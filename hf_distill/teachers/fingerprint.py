"""What tells one teacher from another: its weights and its config, never its name."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.heads import core_model
from hf_distill.teachers.placement import real_tensor

# Entries of a config that say where a model came from or how it is run, not what it answers.
_NOT_ANSWERS = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache",
    "architectures", "return_dict", "output_hidden_states", "output_attentions",
    "problem_type",  # which a head notes down when it sees its first labels
}  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def config_fingerprint(config: Any) -> str:
    """Of what a config says about answers."""
    content = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
    if isinstance(content.get("quantization_config"), dict):  # says how weights were read; gguf_file, from where
        content["quantization_config"] = {k: v for k, v in content["quantization_config"].items() if k != "gguf_file"}
    return fingerprint({key: value for key, value in content.items() if key not in _NOT_ANSWERS})


def weights_fingerprint(model: nn.Module) -> str:
    """Of every parameter and buffer that the model saves, bit for bit; of packed weights, their parts.

    Raises:
        ValueError: If a weight's bits cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            for part, tensor in _parts(name, real_tensor(model, name, value)):
                digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(part, tensor))
    return digest.hexdigest()


def adapters(model: nn.Module) -> list[Any]:
    """What PEFT's layers do with their weights: how much each adapter counts, and which are on; empty without any."""
    says = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
    layers = [(name, module) for name, module in model.named_modules() if all(hasattr(module, of) for of in says)]
    return [(name, *(getattr(layer, of) for of in says)) for name, layer in layers]


def model_fingerprint(model: Any) -> str:
    """Changes with any weight and any setting that decides a model's answers."""
    parts = weights_fingerprint(model), config_fingerprint(model.config), *adapters(model), *_own_code(model)
    return fingerprint(*parts)


def _own_code(model: Any) -> list[str]:
    """Of a class of the user's own what it is called and what it says: its forward may be another."""
    core = type(core_model(model))
    if core.__module__.split(".")[0] in ("transformers", "peft"):
        return []
    try:
        source = inspect.getsource(core)
    except (OSError, TypeError):  # typed at a prompt
        source = ""
    return [f"{core.__module__}.{core.__qualname__}", source]


def files_fingerprint(folder: Path) -> str | None:
    """Of the weight files in a folder, read in pieces; `None` if it holds none."""
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor subclass (of torchao, say) consists of, named with what else it says of them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    names, context = tensor.__tensor_flatten__()
    for part in names:
        yield from _parts(f"{name}.{part} {type(tensor).__name__} {fingerprint(context)}", getattr(tensor, part))


def _bytes(name: str, tensor: Tensor) -> Any:
    try:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        return plain.view(torch.uint8).numpy().data if plain.numel() else b""
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{name} of the teacher is a {type(tensor).__name__}, whose bits cannot be read ({error}), so the teacher "
            "cannot be recognised. Wrap it in a Teacher of your own with a `fingerprint`, or leave out "
            "teacher_cache_dir."
        ) from error
