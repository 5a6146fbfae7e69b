"""Taking blocks out of a model: where they are, what the config says of them, and what of the weights is kept.

Nothing here knows an architecture. The lists of blocks are those that get shorter when the config is given one block
less, and a student is accepted only if every block that is built from its config is the teacher's block in structure
and settings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.students.build import built, tensors

# What configs call the number of blocks; `attribute_map` resolves most of them.
_DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "num_encoder_layers")
_DECODER_DEPTH = ("decoder_layers", "num_decoder_layers")
# Parts of the names of config entries that can hold one value a block (`layer_types`, `num_key_value_heads`).
_PER_BLOCK = ("layer", "heads", "intermediate_size", "pattern", "attention_window")


@dataclass(frozen=True)
class Stack:
    """The blocks that one number in a config counts.

    Args:
        section: Keys that lead to the sub-config holding the number; empty for the config itself.
        entries: Names of the config entries that hold the number.
        depth: How many blocks there are.
        lists: Names of the module lists that hold the blocks.
    """

    section: tuple[str, ...]
    entries: tuple[str, ...]
    depth: int
    lists: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """The blocks of a stack that are kept."""

    stack: Stack
    blocks: tuple[int, ...]


def find_stack(teacher: PreTrainedModel, decoder: bool = False) -> Stack:
    """The stack of the teacher's blocks; in an encoder-decoder that of the encoder, or of the decoder if asked.

    Raises:
        ValueError: If the model is composed of several, or has no list of blocks that its config counts.
    """
    section, holder = _section(teacher)
    entries = holder.to_dict()
    # A decoder that was built from the config of an encoder-decoder (BartForCausalLM) has only decoder blocks.
    for candidates in (_DECODER_DEPTH,) if decoder else (_DEPTH, _DECODER_DEPTH):
        names = dict.fromkeys(holder.attribute_map.get(name, name) for name in candidates)
        counts = {name: entries[name] for name in names if isinstance(entries.get(name), int)}
        for depth in dict.fromkeys(counts.values()):
            stack = Stack(section, tuple(name for name in counts if counts[name] == depth), depth, ())
            lists = _lists_that_shrink(teacher, stack) if depth > 1 else ()
            if lists or depth == 1:
                return replace(stack, lists=lists)
        if not counts or holder.is_encoder_decoder:
            break
    what = "decoder blocks" if decoder else "blocks"
    raise ValueError(
        f"{type(teacher).__name__} has no list of {what} whose length its config counts (blocks that share one set "
        "of weights, as ALBERT's, are none). Pass student_config=, a smaller config of this architecture."
    )


def _section(teacher: PreTrainedModel) -> tuple[tuple[str, ...], Any]:
    config: Any = teacher.config
    try:
        holder = config.get_text_config()
        sections = [()] if holder is config else [(key,) for key, value in vars(config).items() if value is holder]
    except ValueError:  # several texts
        holder, sections = config, []
    if not sections or (sections[0] and (config.is_encoder_decoder or holder.is_encoder_decoder)):
        raise ValueError(
            f"{type(teacher).__name__} is composed of several models, and create_student cannot tell which of them to "
            "cut. Call create_student on each part, and put the parts together again."
        )
    return sections[0], holder


def _lists_that_shrink(teacher: PreTrainedModel, stack: Stack) -> tuple[str, ...]:
    shorter = skeleton(teacher, (Cut(stack, tuple(range(stack.depth - 1))),))
    ours = {name: len(module) for name, module in shorter.named_modules() if isinstance(module, nn.ModuleList)}
    return tuple(
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == stack.depth and ours.get(name) == stack.depth - 1
    )


def skeleton(teacher: PreTrainedModel, cuts: Sequence[Cut]) -> PreTrainedModel:
    """A model of the teacher's class with fewer blocks and no weights, on the meta device.

    Raises:
        ValueError: If the teacher's config cannot say that these blocks are left.
    """
    try:
        return built(teacher, _cut_entries(teacher.config.to_dict(), cuts))
    except Exception as error:
        kept = " and ".join(str(list(cut.blocks)) for cut in cuts)
        raise ValueError(
            f"{type(teacher).__name__} cannot be built with blocks {kept} of its teacher: {type(error).__name__}: "
            f"{error}. Choose other blocks, or build the student from a config of your own."
        ) from error


def _cut_entries(entries: dict[str, Any], cuts: Sequence[Cut]) -> dict[str, Any]:
    entries = copy.deepcopy(entries)
    for cut in cuts:
        section = entries
        for key in cut.stack.section:
            section = section[key]
        if section.get("out_features") and section["out_features"] == section.get("stage_names", [])[-1:]:
            for key in ("out_features", "out_indices", "stage_names"):  # of a backbone: the last block, as by default
                section.pop(key, None)
        for key, value in section.items():
            if key in cut.stack.entries:
                section[key] = len(cut.blocks)
            elif (
                isinstance(value, (list, tuple))
                and len(value) == cut.stack.depth
                and any(part in key for part in _PER_BLOCK)
            ):
                section[key] = [value[block] for block in cut.blocks]
    return entries


def sources(student: PreTrainedModel, teacher: PreTrainedModel, cuts: Sequence[Cut]) -> dict[str, str]:
    """Which of the teacher's tensors each tensor of the student is a copy of, by name.

    What only block 0 has (T5's relative attention bias) comes from the teacher's block 0, whichever block is first.

    Raises:
        ValueError: If the student, as its config builds it, is not the teacher without the other blocks.
    """
    theirs = dict(tensors(teacher))
    found: dict[str, str] = {}
    borrowed: list[str] = []
    for name, tensor in tensors(student):
        source = _renamed(name, cuts)
        if source not in theirs and _renamed(name, cuts, first=0) in theirs:
            source = _renamed(name, cuts, first=0)
            borrowed.append(name)
        if source not in theirs:
            raise ValueError(_unlike(teacher, f"needs {name}, which the teacher does not have"))
        if theirs[source].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, but the teacher's {source} has {tuple(theirs[source].shape)}"
            raise ValueError(_unlike(teacher, f"needs {name} of shape {shapes}"))
        found[name] = source
    gone = tuple(
        f"{modules}.{block}."
        for cut in cuts
        for modules in cut.stack.lists
        for block in set(range(cut.stack.depth)) - set(cut.blocks)
    )
    used = set(found.values())
    lost = [name for name in teacher.state_dict() if name not in used and not name.startswith(gone)]
    if lost:
        raise ValueError(_unlike(teacher, f"has no place for {lost[0]} of the teacher"))
    _check_settings(student, teacher, cuts, borrowed)
    return found


def _check_settings(student: nn.Module, teacher: nn.Module, cuts: Sequence[Cut], borrowed: Sequence[str]) -> None:
    """Blocks may differ in settings too: whether attention slides, or a scale that depends on the position."""
    modules = dict(teacher.named_modules())
    for name, module in student.named_modules():
        source = _renamed(name, cuts)
        if source == name:
            continue
        allowed = [vars(modules[source])] if source in modules else []
        if any(tensor.startswith(f"{name}.") for tensor in borrowed):
            allowed.append(vars(modules[_renamed(name, cuts, first=0)]))
        for key, value in _settings(module):
            values = [other[key] for other in allowed if key in other]
            if _is_list_of_blocks(key, value, values, student, teacher):
                continue
            if values and value not in values and not _is_position(value, values[0], name, source):
                raise ValueError(
                    _unlike(teacher, f"would have {name}.{key} = {value!r}, but the teacher's {source} {values[0]!r}")
                )
    for key, value in vars(getattr(teacher, "config", None)).items():
        moved = any(block != position for cut in cuts for position, block in enumerate(cut.blocks))
        if "layer_idx" in key and value is True and moved:
            raise ValueError(_unlike(teacher, f"computes with the number of a block, for config.{key} is true"))


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        # Rates of dropping layers may grow with the depth; they are no part of what the model computes.
        values = value if isinstance(value, (tuple, list)) else [value]
        if key != "training" and "drop" not in key and all(isinstance(v, (bool, int, float, str)) for v in values):
            yield key, value


def _is_list_of_blocks(key: str, value: Any, values: Sequence[Any], student: Any, teacher: Any) -> bool:
    """Whether a block has been given the config's whole list of an entry a block (GPT-Neo's `attention_layers`)."""
    ours, theirs = (getattr(getattr(model, "config", None), key, None) for model in (student, teacher))
    return isinstance(value, (list, tuple)) and value == ours and all(each == theirs for each in values)


def _is_position(value: Any, other: Any, name: str, source: str) -> bool:
    """Whether the values are the numbers of the blocks themselves, as `layer_idx` is."""
    ours, theirs = name.split("."), source.split(".")
    numbers = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    return (str(value), str(other)) == numbers


def _renamed(name: str, cuts: Sequence[Cut], first: int | None = None) -> str:
    """What the teacher calls it; with `first`, as if that block of the teacher were the student's first."""
    for cut in cuts:
        for modules in cut.stack.lists:
            if name.startswith(f"{modules}."):
                number, dot, rest = name[len(modules) + 1 :].partition(".")
                block = first if first is not None and number == "0" else cut.blocks[int(number)]
                return f"{modules}.{block}{dot}{rest}"
    return name


def _unlike(teacher: nn.Module, what: str) -> str:
    return (
        f"{type(teacher).__name__} with these blocks {what}: its config cannot express them. Keep block 0, choose "
        "blocks whose kinds come in the teacher's order, or, if the teacher was changed after it was loaded "
        "(adapters, new heads), load it afresh."
    )
