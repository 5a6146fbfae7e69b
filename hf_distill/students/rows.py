"""A model for a tokenizer with other ids: which rows its tokens have, and what the config says of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_distill.students.build import built, resized, tensors

Model = TypeVar("Model", bound=PreTrainedModel)


def carry_vocabulary(teacher: Model, processing_class: Any, new_processing_class: Any) -> Model:
    """A copy of the teacher for a tokenizer that has some of its tokens, each with the rows it had.

    Axes of the vocabulary are those that grow when the config's vocabulary does: input and output embeddings, biases.

    Raises:
        ValueError: If the new tokenizer has tokens that the old one has not, lacks one that the config names, or the
            teacher's config cannot express the change.
    """
    ours, theirs = new_processing_class.get_vocab(), processing_class.get_vocab()
    _check_tokens(ours, theirs, _size(teacher))
    tokens = sorted(ours, key=ours.__getitem__)
    rows = torch.tensor([theirs[token] for token in tokens])
    entries = vocabulary_entries(teacher, len(tokens))
    moved = {old: ours.get(token) for token, old in theirs.items()}
    _renumber(entries, moved, {old: token for token, old in theirs.items()})
    _check_positions(teacher, moved)
    student = resized(teacher, entries, {name: {axis: rows} for name, axis in vocabulary_axes(teacher).items()})
    if student.can_generate():
        student.generation_config = _generation(teacher, moved)
    return student


def vocabulary_axes(teacher: PreTrainedModel) -> dict[str, int]:
    """The axis of each tensor that has one entry a token.

    Raises:
        ValueError: If the tables do not follow the config's `vocab_size`.
    """
    size = _size(teacher)
    larger = dict(tensors(built(teacher, vocabulary_entries(teacher, size + 1))))
    axes = {
        name: axis
        for name, tensor in tensors(teacher)
        for axis, (ours, grown) in enumerate(zip(tensor.shape, larger[name].shape, strict=True))
        if (ours, grown) == (size, size + 1)
    }
    embeddings: Any = teacher.get_input_embeddings()
    if not any(embeddings.weight is tensor for name, tensor in tensors(teacher) if name in axes):
        raise ValueError(
            f"{type(teacher).__name__} has an embedding table of {tuple(embeddings.weight.shape)}, which does not "
            f"follow config.vocab_size={size}. Call teacher.resize_token_embeddings({size}) first."
        )
    return axes


def _size(teacher: PreTrainedModel) -> int:
    size = getattr(teacher.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"The config of {type(teacher).__name__} has no vocab_size, so it has no rows to choose from."
        )
    return size


def vocabulary_entries(teacher: PreTrainedModel, size: int) -> dict[str, Any]:
    """The entries of the teacher's config, for a vocabulary of another size."""
    config: Any = teacher.config
    text = config.get_text_config()
    section = entries = config.to_dict()
    for key, value in vars(config).items():
        section = entries[key] if value is text else section
    section[text.attribute_map.get("vocab_size", "vocab_size")] = size
    return entries


def _check_tokens(ours: Mapping[str, int], theirs: Mapping[str, int], size: int) -> None:
    foreign = [token for token in ours if token not in theirs]
    if foreign:
        raise ValueError(
            f"new_processing_class has {len(foreign)} tokens that processing_class has not, such as {foreign[0]!r}: "
            "the teacher has no rows for them. Make it with trim_vocabulary(processing_class, corpus, size)."
        )
    if sorted(ours.values()) != list(range(len(ours))):
        raise ValueError(
            f"new_processing_class has {len(ours)} tokens, but their ids are not 0 to {len(ours) - 1}. Make it with "
            "trim_vocabulary(processing_class, corpus, size)."
        )
    if max(theirs.values()) >= size:
        raise ValueError(
            f"processing_class uses ids up to {max(theirs.values())}, but the teacher's vocabulary has {size} rows. "
            "Pass the tokenizer that the teacher was trained with."
        )


def _renumber(entries: Any, moved: Mapping[int, int | None], names: Mapping[int, str]) -> None:
    """Give every `..._token_id` of a config, nested ones too, its new number."""
    for key, value in list(entries.items()):
        if isinstance(value, dict):
            _renumber(value, moved, names)
        elif str(key).endswith(("_token_id", "_token_index")) and value is not None:
            old = value if isinstance(value, list) else [value]
            gone = [index for index in old if index in names and moved[index] is None]
            if gone:
                raise ValueError(
                    f"new_processing_class lacks the token {names[gone[0]]!r}, which is the teacher's config.{key}. "
                    "Keep it: trim_vocabulary keeps every token that the tokenizer calls special."
                )
            new = [moved[index] for index in old if index in names]  # others were never made by this tokenizer
            entries[key] = new if isinstance(value, list) else next(iter(new), None)


def _check_positions(teacher: PreTrainedModel, moved: Mapping[int, int | None]) -> None:
    """RoBERTa's family counts positions from the padding id on."""
    pad = getattr(teacher.config.get_text_config(), "pad_token_id", None)
    if not isinstance(pad, int) or moved.get(pad, pad) == pad:
        return
    for name, module in teacher.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx == pad:
            raise ValueError(
                f"The padding token has id {pad} in the teacher and {moved[pad]} in new_processing_class, "
                f"but {type(teacher).__name__} counts positions from that id on. Leave the first {pad + 1} tokens as "
                "they are."
            )


def _generation(teacher: Any, moved: Mapping[int, int | None]) -> Any:
    config = copy.deepcopy(teacher.generation_config)
    for key, value in vars(config).items():
        if key.endswith("_token_id") and value is not None:
            new = [moved.get(index) for index in (value if isinstance(value, list) else [value])]
            known = [index for index in new if index is not None]
            setattr(config, key, known if isinstance(value, list) else next(iter(known), None))
        elif key in ("suppress_tokens", "begin_suppress_tokens") and value is not None:
            setattr(config, key, [new for new in (moved.get(index) for index in value) if new is not None])
    return config
