"""From what the user passed as a teacher to an object that answers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from hf_distill.heads import core_model, task_class
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.online import OnlineTeacher


def load_teacher(
    teacher: nn.Module | Teacher | str | os.PathLike[str] | None,
    args: TrainingArguments,
    student: nn.Module,
    device: torch.device,
) -> Teacher | None:
    """The teacher as an object that answers, or `None` if none was given.

    A name or path loads the student's task class. A name runs no code from the Hub unless
    `teacher_model_init_kwargs={"trust_remote_code": True}` allows it.

    Raises:
        ValueError: If the teacher is named twice, is no teacher, or is the student itself.
    """
    name = getattr(args, "teacher_model_name_or_path", None)
    if teacher is not None and name is not None:
        raise ValueError(
            f"Both teacher_model and args.teacher_model_name_or_path={name!r} name a teacher. Pass one of them."
        )
    teacher = teacher if teacher is not None else name
    if teacher is None:
        return None
    device = torch.device(getattr(args, "teacher_device", None) or device)
    if isinstance(teacher, (str, os.PathLike)):
        kwargs = {"trust_remote_code": False, **(getattr(args, "teacher_model_init_kwargs", None) or {})}
        revision = getattr(args, "teacher_model_revision", None)
        loaded = task_class(student).from_pretrained(teacher, revision=revision or "main", **kwargs)
        return OnlineTeacher(loaded, device, name=str(teacher))
    if isinstance(teacher, nn.Module):
        _refuse_shared(student, teacher)
        return OnlineTeacher(teacher, device)
    if isinstance(teacher, Teacher):
        return teacher
    raise ValueError(
        "teacher_model must be a model, a path or Hub name, or a Teacher (see hf_distill.teachers.Teacher), got "
        f"{type(teacher).__name__}."
    )


def load_processing_class(teacher: Teacher | None, like: Any, revision: str | None = None) -> Any:
    """The tokenizer or image processor beside the teacher's weights, of the kind that `like` is; `None` if there is
    none.
    """
    name = getattr(getattr(teacher, "config", None), "_name_or_path", "")
    if not name or like is None:
        return None
    auto: Any = AutoTokenizer if isinstance(like, PreTrainedTokenizerBase) else AutoImageProcessor
    try:
        return auto.from_pretrained(name, revision=revision or "main")
    except (
        Exception
    ):  # absent, unreachable, or of a kind that the auto class does not know: the caller says what goes unchecked
        return None


def _refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    ours = {id(p) for p in student.parameters()}
    if any(id(p) in ours for p in teacher.parameters()):
        raise ValueError(
            f"The teacher ({type(core_model(teacher)).__name__}) shares parameters with the student: training would "
            "change it, and freezing it would freeze the student. Pass a copy (copy.deepcopy(model)), or load it a "
            "second time."
        )
