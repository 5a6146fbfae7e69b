"""The widths that a config states, and the config of a narrower model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

# What configs call the widths; `attribute_map` resolves the rest.
NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": (
        "n_inner",
        "hidden_dim",
        "ffn_dim",
        "intermediate_size",
        "d_ff",
        "d_inner",
        "dff",
        "ffn_hidden_size",
    ),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
}
# Widths that some configs state apart, and that follow the hidden size where they equal it.
_FOLLOWERS = ("embedding_size", "pooler_output_size", "pooler_hidden_size", "word_embed_proj_dim")


def narrowed_entries(teacher: PreTrainedModel, widths: Mapping[str, int]) -> dict[str, Any]:
    """The entries of the teacher's config with other widths; head sizes are kept where they can be.

    Raises:
        ValueError: If a width is not in the config, is larger than the teacher's, or the heads do not divide.
    """
    config: Any = teacher.config
    if config.get_text_config() is not config or config.is_encoder_decoder:
        raise ValueError(
            f"{type(teacher).__name__} is composed of several stacks; only encoders and decoders by themselves can be "
            "made narrower. Cut its depth and its vocabulary instead."
        )
    entries = config.to_dict()
    sizes = current_widths(teacher)
    for name, value in widths.items():
        if name not in sizes:
            raise ValueError(f"The config of {type(teacher).__name__} has no {name} that could be changed.")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= sizes[name]:
            raise ValueError(
                f"{name} must be a whole number from 1 to {sizes[name]}, the teacher's, got {value!r}: a student is "
                "cut from the teacher. Ask for less, or leave it out."
            )
    if "intermediate_size" in sizes:  # GPT-2 writes None for four times the hidden size
        entries[_entry(config, "intermediate_size")] = sizes["intermediate_size"]
    hidden = widths.get("hidden_size", sizes["hidden_size"])
    new = {**_fitting_heads(teacher, sizes, widths, hidden), **widths}
    for name, value in new.items():
        entries[_entry(config, name)] = value
    if "d_head" in entries:  # XLNet states it beside both
        entries["d_head"] = hidden // entries[_entry(config, "num_attention_heads")]
    for name in _FOLLOWERS:
        if entries.get(name) == sizes["hidden_size"]:
            entries[name] = hidden
    return entries


def current_widths(teacher: PreTrainedModel) -> dict[str, int]:
    """The widths that the teacher's config states, by their usual names."""
    config: Any = teacher.config
    found = {name: getattr(config, _entry(config, name), None) for name in NAMES}
    if found["intermediate_size"] is None and "n_inner" in config.to_dict():
        found["intermediate_size"] = 4 * config.hidden_size
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _entry(config: Any, name: str) -> str:
    candidates = [config.attribute_map.get(candidate, candidate) for candidate in NAMES[name]]
    entries = config.to_dict()
    return next((candidate for candidate in candidates if candidate in entries), candidates[0])


def _fitting_heads(
    teacher: PreTrainedModel, sizes: Mapping[str, int], widths: Mapping[str, int], hidden: int
) -> dict[str, int]:
    """How many heads go with a hidden size: of the teacher's head size if they can be; refuse what does not divide."""
    heads = sizes["num_attention_heads"]
    groups = sizes.get("num_key_value_heads", heads)
    asked = widths.get("num_attention_heads")
    found: dict[str, int] = {}
    if not isinstance(teacher.config.to_dict().get("head_dim"), int):
        size = sizes["hidden_size"] // heads
        asked = asked or (hidden // size if hidden % size == 0 else heads)
        if hidden % asked:
            raise ValueError(
                f"hidden_size={hidden} cannot be divided among {asked} heads. Choose a multiple of {asked}, or "
                "another num_attention_heads."
            )
        if hidden // asked > size:
            raise ValueError(
                f"{asked} heads for hidden_size={hidden} would have {hidden // asked} features each, the teacher's "
                f"{heads} have {size}: heads can be cut, not put together. Ask for at least "
                f"{-(-hidden // size)} heads, or a smaller hidden_size."
            )
        found["num_attention_heads"] = asked
    asked = asked or heads
    if "num_key_value_heads" in sizes:
        kept = widths.get("num_key_value_heads", groups if groups == 1 else max(groups * asked // heads, 1))
        if kept * heads != groups * asked and not (kept == groups == 1):
            raise ValueError(
                f"The teacher has {heads // groups} heads for each of its {groups} key-value heads, and so must the "
                f"student: got num_attention_heads={asked} and num_key_value_heads={kept}."
            )
        found["num_key_value_heads"] = kept
    return found


def heads_of(teacher: PreTrainedModel, entries: Mapping[str, Any]) -> dict[str, int]:
    """Heads, key-value heads and the size of one, of a config."""
    config: Any = teacher.config
    heads = entries[_entry(config, "num_attention_heads")]
    size = entries.get("head_dim")
    return {
        "heads": heads,
        "groups": entries.get("num_key_value_heads") or heads,
        "size": size if isinstance(size, int) else entries[_entry(config, "hidden_size")] // heads,
    }
