"""What is kept beside the answers: shapes of layers, and the output head of a language model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_distill.activations import Needs, Shapes
from hf_distill.output_head import OutputHead

SHAPES, HEAD = "shapes.json", "head.safetensors"


def read_shapes(home: Path, needs: Needs, rows: int, length: int | None) -> Shapes | None:
    """The shapes of all layers as a dry forward found them before, for a batch of this size; without those of the
    logits. `None` if that forward did not return what is needed.
    """
    content = _read_json(home / SHAPES) or {"hidden_states": [], "attentions": []}

    def sized(shape: Sequence[int | str]) -> tuple[int, ...]:
        return (rows, *(int(length if size == "T" and length is not None else size) for size in shape[1:]))

    states, maps = (tuple(map(sized, content[kind])) for kind in ("hidden_states", "attentions"))
    known = (states or not needs.hidden_states) and (maps or not needs.attentions)
    return Shapes(None, states, maps) if known else None


def write_shapes(home: Path, shapes: Shapes, length: int | None) -> None:
    """Keep the shapes of a dry forward, so that the next run need not load the teacher for them."""

    def named(shape: Sequence[int], axes: tuple[int, ...]) -> list[int | str]:
        return ["T" if axis in axes and size == length else size for axis, size in enumerate(shape)]

    content = {
        "hidden_states": [named(shape, (1,) if len(shape) == 3 else ()) for shape in shapes.hidden_states],
        "attentions": [named(shape, (2, 3)) for shape in shapes.attentions],
    }
    write_json(home / SHAPES, content)


def read_head(home: Path, device: torch.device) -> OutputHead | None:
    """The teacher's output head, if it was kept: all of the teacher that its last hidden states need."""
    if not (home / HEAD).is_file():
        return None
    with safe_open(str(home / HEAD), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        said = json.loads(file.metadata()["head"])
    classes, width = tensors["weight"].shape
    linear = nn.Linear(width, classes, bias="bias" in tensors, device="meta")
    linear.load_state_dict(tensors, assign=True)
    return OutputHead(linear.requires_grad_(False).to(device), said["scale"], said["softcap"])


def write_head(home: Path, head: OutputHead) -> None:
    """Keep an output head."""
    home.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(home / HEAD)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in head.linear.state_dict().items()}
    save_file(tensors, unfinished, {"head": json.dumps({"scale": head.scale, "softcap": head.softcap})})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, home / HEAD)


def write_json(path: Path, content: Any) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
