"""From what the user passed as a teacher to an object that answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import find_adapter_config_file

from hf_distill.heads import core_model, task_class
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.ema import EMATeacher
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.fingerprint import files_fingerprint
from hf_distill.teachers.online import LazyTeacher, OnlineTeacher

# `auto` is the model's own precision, and for a cache the fastest that the device has.
_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_teacher(
    teacher: nn.Module | Teacher | str | os.PathLike[str] | Sequence[Any] | None,
    args: TrainingArguments,
    student: nn.Module,
    device: torch.device,
) -> Teacher | None:
    """The teacher as an object that answers, or `None` if none was given.

    A name or path loads the student's task class, several make an [`EnsembleTeacher`]. A name runs no code from the
    Hub unless `teacher_model_init_kwargs={"trust_remote_code": True}` allows it.

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
    dtype = _DTYPES[getattr(args, "teacher_dtype", "auto")]
    if isinstance(teacher, (str, os.PathLike)):
        return _by_name(str(teacher), args, student, device, dtype)
    if isinstance(teacher, nn.Module):
        _refuse_shared(student, teacher)
        return OnlineTeacher(teacher, device, dtype=dtype)
    if isinstance(teacher, (list, tuple)):
        if any(isinstance(member, EMATeacher) for member in teacher):
            raise ValueError(
                "An EMATeacher changes with every step and cannot be one of several teachers. Pass it by itself."
            )
        members: list[Any] = [load_teacher(member, args, student, device) for member in teacher]
        return EnsembleTeacher(members)
    if isinstance(teacher, EMATeacher):
        teacher.dtype = teacher.dtype or dtype
        teacher.follow(student, device)
    if isinstance(teacher, Teacher):
        return teacher
    raise ValueError(
        "teacher_model must be a model, a path or Hub name, a list of these, or a Teacher (see "
        f"hf_distill.teachers.Teacher), got {type(teacher).__name__}."
    )


def cache_dtype(args: TrainingArguments, device: torch.device) -> torch.dtype:
    """The precision in which a teacher fills a cache: what was asked for, else bf16 where the device has it."""
    asked = _DTYPES[getattr(args, "teacher_dtype", "auto")]
    if asked is not None:
        return asked
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether a device computes in bf16 itself; elsewhere it is emulated, and slower than fp32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    if kind == "cpu" and cpu.is_file():
        return any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))
    return False


def _by_name(
    name: str, args: TrainingArguments, student: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> Teacher:
    kwargs = {"trust_remote_code": False, **(getattr(args, "teacher_model_init_kwargs", None) or {})}
    revision = getattr(args, "teacher_model_revision", None) or "main"
    auto = task_class(student)

    def load() -> tuple[nn.Module, Sequence[str]]:
        model, info = auto.from_pretrained(name, revision=revision, output_loading_info=True, **kwargs)
        return model, sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})

    # Only a cache can make loading needless; and what is more than reading weights needs the real model.
    cached = getattr(args, "teacher_cache_dir", None) and kwargs == {"trust_remote_code": False}
    if cached and find_adapter_config_file(name, revision=revision) is None:
        config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        content = files_fingerprint(Path(name)) if os.path.isdir(name) else getattr(config, "_commit_hash", None)
        if content is not None and getattr(config, "quantization_config", None) is None:
            with torch.device("meta"):
                skeleton = auto.from_config(config)
            return LazyTeacher(skeleton, load, content, device, name, dtype)
    model, untrained = load()
    return OnlineTeacher(model, device, name, dtype, untrained)


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
    except Exception:  # absent, unreachable, or unknown to the auto class: the caller says what goes unchecked
        return None


def _refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    ours = {id(p) for p in student.parameters()}
    if any(id(p) in ours for p in teacher.parameters()):
        raise ValueError(
            f"The teacher ({type(core_model(teacher)).__name__}) shares parameters with the student: training would "
            "change it, and freezing it would freeze the student. Pass a copy (copy.deepcopy(model)), or load it a "
            "second time."
        )
