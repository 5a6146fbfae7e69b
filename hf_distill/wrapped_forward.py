"""Running the losses inside the student's forward, so that whatever wraps the student sees their parameters.

A projection that is called outside the wrapped forward is not synchronised between processes, and one that is a child
of the student but called outside its forward makes DistributedDataParallel fail on the second use of a parameter. So
for the length of training the losses are a child of the student, and they are called inside its forward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from hf_distill.losses import LossTerms

CHILD = "distillation_losses"
LOSSES_NAME = "distillation_losses.safetensors"


def attach_losses(student: nn.Module | None, losses: LossTerms) -> None:
    """Make trainable losses a child of the student: clipped, synchronised and optimised with it, but never saved with
    it.
    """
    keys = set(losses.state_dict())
    if student is None or not keys or hasattr(student, CHILD):
        return
    student.add_module(CHILD, losses)
    ignored = getattr(student, "_keys_to_ignore_on_save", None) or set()
    student._keys_to_ignore_on_save = {*ignored, *(f"{CHILD}.{key}" for key in keys)}  # type: ignore[assignment]


def detach_losses(student: nn.Module | None) -> None:
    """Undo `attach_losses`."""
    if student is None or not hasattr(student, CHILD):
        return
    delattr(student, CHILD)
    ignored: Any = student._keys_to_ignore_on_save
    student._keys_to_ignore_on_save = {key for key in ignored if not key.startswith(f"{CHILD}.")}  # type: ignore[assignment]


def forward_through(wrapper: nn.Module, student: nn.Module, step: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Call `step(student, **inputs)` from inside `wrapper(**inputs)`.

    For the outer call alone the student's forward is replaced by `step`; the student that `step` calls is the
    untouched one, with Accelerate's autocast around its forward.
    """
    own = vars(student).get("forward")  # Accelerate's autocast patches the instance; usually there is nothing here

    def restore() -> None:
        if own is None:
            vars(student).pop("forward", None)
        else:
            student.forward = own

    def redirected(*args: Any, **kwargs: Any) -> Any:
        restore()
        return step(student, *args, **kwargs)

    student.forward = redirected
    try:
        return wrapper(**inputs)
    finally:
        restore()


def save_losses(losses: LossTerms, folder: str) -> None:
    """Write what the losses have learned beside a checkpoint's student."""
    state = losses.state_dict()
    if state:
        os.makedirs(folder, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, os.path.join(folder, LOSSES_NAME))


def load_losses(losses: LossTerms, folder: str) -> None:
    """Read it back.

    Raises:
        ValueError: If the losses have parameters that the checkpoint lacks.
    """
    if not losses.state_dict():
        return
    path = os.path.join(folder, LOSSES_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint {folder} has no {LOSSES_NAME}, but the losses have learned parameters to restore. "
            "Resume with the losses that the checkpoint was made with, or start a new run."
        )
    losses.load_state_dict(load_file(path))
