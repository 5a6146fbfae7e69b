"""The student itself as its teacher: an average of its own weights over time."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.online import OnlineTeacher

EMA_NAME = "ema_teacher.safetensors"


class EMATeacher(OnlineTeacher):
    """A copy of the student whose weights follow the student's slowly: self-distillation by a mean teacher.

    After each optimizer step `teacher = decay * teacher + (1 - decay) * student`, weight by weight, from the student's
    initial weights on (Tarvainen and Valpola, 2017, "Mean teachers are better role models", section 2); buffers are
    the student's. The paper starts with a decay of 0.99 and goes on with 0.999. Each side sees noise of its own there;
    here the teacher has no dropout, and the student has its own.

    It is the one teacher that changes: it is kept in checkpoints (`ema_teacher.safetensors`, beside the losses'
    state), comes back on resume, and cannot have a teacher cache. At the end the average is
    `trainer.teacher.model`, often the better model of the two.

    Pass it as `teacher_model=EMATeacher()`; the trainer shows it the student. Useful where rows have no labels, beside
    hard labels elsewhere: with the student's own answers alone nothing is learned.

    Args:
        decay: Share of the old average that is kept at each step, in [0, 1). 0 is the student of the step before.
        dtype: Precision that it computes in, as in [`OnlineTeacher`].

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, decay: float = 0.999, dtype: torch.dtype | None = None) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1) (at 1 the teacher would never learn), got {decay}.")
        self.decay, self.dtype = decay, dtype
        unknown: Any = None  # until the student is
        self.config, self.name, self.input_names = unknown, "the student's average", set()

    def follow(self, student: nn.Module, device: torch.device | str | None = None) -> None:
        """Start from a student's weights; of 16 bits each, in which most steps would be rounded away, in float32."""
        average = copy.deepcopy(student)
        short = {p.dtype for p in average.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        if short:
            self.dtype = self.dtype or short.pop()
            for parameter in average.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
        super().__init__(average, device, self.name, self.dtype)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """One step of the average; the student's other tensors are taken over."""
        ours = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        learned = dict(self.model.named_parameters())
        for name, average in _tensors(self.model).items():
            value = ours[name].to(average)
            if name in learned and average.is_floating_point():
                average.lerp_(value, 1.0 - self.decay)
            else:
                average.copy_(value)

    def fingerprint(self) -> str:
        """There is none.

        Raises:
            ValueError: Always; a teacher cache asks.
        """
        raise ValueError(
            "An EMATeacher changes with every step, so its answers cannot be cached. Leave teacher_cache_dir unset."
        )


class UpdateTeacher(TrainerCallback):
    """Lets an [`EMATeacher`] follow after every optimizer step, before anything is evaluated or saved.

    Args:
        teacher: Who follows.
    """

    def __init__(self, teacher: EMATeacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.teacher.update(model)


def start_following(teacher: Teacher | None, student: nn.Module, device: torch.device | str | None) -> None:
    """Show a new student to a teacher that follows it; others do not mind."""
    if isinstance(teacher, EMATeacher):
        teacher.follow(student, device)


def save_teacher(teacher: Teacher | None, folder: str) -> None:
    """Write a teacher that changes beside a checkpoint's student."""
    if isinstance(teacher, EMATeacher):
        os.makedirs(folder, exist_ok=True)
        state = {name: value.detach().contiguous() for name, value in _tensors(teacher.model).items()}
        save_file(state, os.path.join(folder, EMA_NAME))


def restore_teacher(teacher: Teacher | None, folder: str) -> None:
    """Read it back.

    Raises:
        ValueError: If the checkpoint has none.
    """
    if not isinstance(teacher, EMATeacher):
        return
    path = os.path.join(folder, EMA_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint {folder} has no {EMA_NAME}, so the average of the student's weights cannot go on. Resume "
            "with the teacher that the checkpoint was made with, or start a new run."
        )
    stored = load_file(path)
    with torch.no_grad():
        for name, value in _tensors(teacher.model).items():
            value.copy_(stored[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
