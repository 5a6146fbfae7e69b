"""What tells one teacher from another: its weights and its config, never its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Entries of a config that say where a model came from or how it is run, not what it answers.
_NOT_ANSWERS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def config_fingerprint(config: Any) -> str:
    """Of what a config says about answers."""
    content = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return fingerprint({key: value for key, value in content.items() if key not in _NOT_ANSWERS})


def weights_fingerprint(model: nn.Module) -> str:
    """Of every parameter and buffer that the model saves, bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


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


def _bytes(tensor: Tensor) -> Any:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else b""
