"""What may be asked of a student, and which blocks that names."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.heads import core_model
from hf_distill.students.blocks import LayerChoice, choose_blocks
from hf_distill.students.depth import Stack, find_stack


def argument(*pair: tuple[str, int | Sequence[int] | None]) -> tuple[str, int | Sequence[int]] | None:
    """The one argument of a group that was given, with its name."""
    given = [(name, value) for name, value in pair if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"Both {given[0][0]}={given[0][1]!r} and {given[1][0]}={given[1][1]!r} say which blocks to keep. Pass one "
            "of them."
        )
    return given[0] if given else None


@contextmanager
def other_errors_explained(teacher: PreTrainedModel) -> Iterator[None]:
    """Say what to do where an architecture refuses a smaller shape in its own words.

    Raises:
        ValueError: In place of any other error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and is_ours(error):
            raise
        raise ValueError(
            f"No smaller shape of {type(teacher).__name__} can be proposed ({type(error).__name__}: {error}). Give a "
            "config yourself: student_config=..."
        ) from error


def is_ours(error: BaseException) -> bool:
    """Whether this package has raised it, and not the architecture."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return str(last[0].f_globals.get("__name__", "")).startswith("hf_distill")


def chosen_blocks(
    teacher: PreTrainedModel, asked: Mapping[str, tuple[str, Any] | None], layer_choice: LayerChoice,
    calibration: Iterable[Mapping[str, Tensor]] | None,
) -> list[tuple[Stack, list[tuple[int, ...]]]]:  # fmt: skip
    """For each stack that is cut the blocks to keep, first and second choice."""
    return [
        (stack, _choices(teacher, stack, name, value, "uniform" if decoder else layer_choice, calibration))
        for decoder, pair in enumerate(asked.values())
        if pair
        for name, value in [pair]
        for stack in [find_stack(teacher, decoder=bool(decoder))]
    ]


def _choices(
    teacher: PreTrainedModel, stack: Stack, name: str, value: int | Sequence[int], choice: LayerChoice,
    calibration: Iterable[Mapping[str, Tensor]] | None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """The blocks to keep; for a number also the second choice."""
    if "num_" not in name:
        return [_checked(stack, name, value)]
    if not _is_int(value) or not 1 <= value <= stack.depth:  # type: ignore[operator]
        raise ValueError(
            f"{name} must be a whole number from 1 to {stack.depth}, the depth of the teacher, got {value!r}. Pass "
            "one of those, or the blocks themselves."
        )
    blocks = choose_blocks(teacher, stack.depth, value, choice, calibration)  # type: ignore[arg-type]
    return [blocks, (0, *blocks[1:])]


def _checked(stack: Stack, name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    blocks = () if isinstance(value, (int, str)) else tuple(value)
    last = stack.depth - 1
    if not blocks or not all(_is_int(block) for block in blocks):
        raise ValueError(
            f"{name} must be a list of block numbers from 0 to {last}, got {value!r}. To give only their number, use "
            f"num_{name if name.startswith('decoder') else 'hidden_layers'}."
        )
    outside = [block for block in blocks if not 0 <= block <= last]
    if outside:
        raise ValueError(
            f"{name}={list(blocks)} asks for block {outside[0]}, but the teacher has blocks 0 to {last}. Count "
            "from 0; negative numbers are not taken."
        )
    if any(a >= b for a, b in pairwise(blocks)):
        raise ValueError(
            f"{name} must name every block once and in increasing order, got {list(blocks)}. Use "
            f"{sorted(set(blocks))}."
        )
    return blocks


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse what is no model by itself."""
    if core_model(teacher) is not teacher:
        raise ValueError(
            f"create_student needs the model itself, got one wrapped by PEFT ({type(teacher).__name__}). Merge the "
            "adapter first: teacher.merge_and_unload()."
        )
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"create_student needs a Transformers model, got {type(teacher).__name__}. Load a name or path with the "
            "AutoModelFor... class of its task, and unwrap a compiled or parallel model."
        )


def check_choices(teacher: PreTrainedModel, asked: Mapping[str, tuple[str, Any] | None], other_cuts: bool) -> None:
    """Something must be asked for, and of a stack that is there."""
    if not any(asked.values()) and not other_cuts:
        raise ValueError(
            "create_student needs to know what to keep, got neither num_hidden_layers nor layers. Pass one of them, "
            "for the decoder of an encoder-decoder num_decoder_layers or decoder_layers, a width (hidden_size, ...), "
            "new_processing_class, or a budget (compression, max_parameters, max_mb)."
        )
    if asked["decoder_layers"] and not teacher.config.is_encoder_decoder:
        name = asked["decoder_layers"][0]
        raise ValueError(
            f"{name} is for encoder-decoders, but {type(teacher).__name__} is none. Pass num_hidden_layers or layers "
            "instead."
        )


def check_processing_classes(old: Any, new: Any) -> None:
    """Both tokenizers, or none."""
    if (old is None) != (new is None):
        given, missing = ("processing_class", "new_processing_class")[:: 1 if new is None else -1]
        raise ValueError(
            f"{given} was given without {missing}. The rows of a trimmed vocabulary are found by token, so both are "
            "needed: the teacher's tokenizer and what trim_vocabulary made of it."
        )


def refuse_beside_config(given: Mapping[str, Any]) -> None:
    """A config says everything by itself."""
    others = sorted(set(given) - {"teacher", "student_config"})
    if others:
        raise ValueError(
            f"student_config says everything about the student, but {', '.join(others)} was given too. Set it in the "
            "config, or leave out student_config."
        )


def refuse_beside_stages(given: Mapping[str, Any]) -> None:
    """Convolutional stages have no such dimensions."""
    if given:
        raise ValueError(
            f"{min(given)} is no dimension of a network of convolutional stages, whose widths all shrink by one "
            "factor. Leave it out, or set hidden_sizes and depths in student_config=."
        )
