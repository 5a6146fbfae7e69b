"""A shape for a student of a given size."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.students.build import built
from hf_distill.students.depth import Cut, Stack, find_stack, skeleton
from hf_distill.students.rows import vocabulary_entries
from hf_distill.students.shapes import current_widths, narrowed_entries

logger = logging.getLogger(__name__)

SLACK = 0.05  # of the budget may stay unused
# Hidden sizes that are tried are multiples of it (below 64 of 2), where the feed-forward size fills the rest.
_STEP = 8
_FEED_FORWARD = 3.0  # a block that is all feed-forward costs more than one block more or less
_OTHER_HEADS = 0.75  # heads of another size than the teacher's cost as much as half or twice as many blocks


class NoShapeError(ValueError):
    """No student of the size asked for can be cut from the teacher."""


def parameter_budget(
    teacher: PreTrainedModel, compression: float | None, max_parameters: int | None, max_mb: float | None
) -> int | None:
    """How many parameters a student may have, `None` if nothing was asked. A MB is 10^6 bytes in the teacher's dtype.

    Raises:
        ValueError: If more than one limit was given, or one that is no limit.
    """
    limits = {"compression": compression, "max_parameters": max_parameters, "max_mb": max_mb}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both limit the size. Pass one of them.")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= (name == "compression"):
            raise ValueError(f"{name} must be a number above {int(name == 'compression')}, got {value!r}.")
    if not given:
        return None
    name, value = next(iter(given.items()))
    if compression is not None:
        budget = count(teacher) / compression
    else:
        budget = value if max_mb is None else max_mb * 1e6 / teacher.dtype.itemsize
    if budget < 1:
        raise ValueError(f"{name}={value!r} leaves no parameter. Allow a larger student.")
    return int(budget)


def count(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def propose(
    teacher: PreTrainedModel, budget: int, fixed: Mapping[str, int], depth: int | None, vocabulary: int | None
) -> tuple[dict[str, int], PreTrainedModel]:
    """The shape within the budget, and at most 5 % below it, that is nearest to the teacher's proportions.

    Nearest means: depth and hidden size shrink by like factors, and the feed-forward size in proportion to the latter;
    the sum of the absolute logarithms of both departures, the second times 3, is least. A hidden size that does not
    keep the teacher's head size counts 0.75 more, and comes last under rotary positions: they turn the features of a
    head in pairs, so that no weight of a smaller head could be carried over. A single block, in which no token sees
    what another has read, comes only where two do not fit: a tagger 100 times smaller than MiniLM was right in 93.7 %
    of the words with one block, in 95.3 % with two and in 95.2 % with three (validation, one seed).

    Where all blocks and widths fit, since fewer tokens made the model small enough, they stay, with a warning if more
    than 5 % of the budget is left.

    Args:
        teacher: The model to shrink.
        budget: The most parameters.
        fixed: Widths that were asked for.
        depth: The number of blocks, if it was asked for.
        vocabulary: The number of tokens of a new tokenizer, if there is one.

    Returns:
        `num_hidden_layers` and the widths, and a model of that shape without weights.

    Raises:
        NoShapeError: If there is no such shape.
    """
    stack = find_stack(teacher)
    sizes = current_widths(teacher)
    ratio = sizes.get("intermediate_size", 0) / sizes["hidden_size"]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    rotary = _rotary_heads(teacher)
    best: tuple[tuple[bool, bool, float], dict[str, int], PreTrainedModel] | None = None
    tried: list[int] = []
    for blocks in [depth] if depth else _depths(stack.depth):
        for shape, model in _fits(teacher, stack, blocks, budget, fixed, vocabulary, ratio):
            tried.append(count(model))
            whole = blocks == stack.depth and all(shape[name] == sizes[name] for name in shape)
            if not (0 if whole else (1 - SLACK) * budget) <= tried[-1] <= budget:
                continue
            off = abs(math.log(shape["hidden_size"] / sizes["hidden_size"] * stack.depth / blocks))
            if "intermediate_size" in shape:
                off += _FEED_FORWARD * abs(math.log(shape["intermediate_size"] / (ratio * shape["hidden_size"])))
            off += _OTHER_HEADS * (shape["hidden_size"] % head > 0)
            rank = rotary and shape["hidden_size"] % head > 0, blocks == 1, off
            if best is None or rank < best[0]:
                best = rank, {"num_hidden_layers": blocks, **shape}, model
    if best is None:
        raise NoShapeError(
            f"No student of at most {budget:,} parameters, and at least {1 - SLACK:.0%} of that, can be cut from "
            f"{type(teacher).__name__} with what was asked for; those that were tried have "
            f"{min(tried, default=0):,} to {max(tried, default=0):,}. Allow another size, leave dimensions open, or "
            "trim the vocabulary (trim_vocabulary)."
        )
    if count(best[2]) < (1 - SLACK) * budget:
        logger.warning(
            "With all blocks and widths of the teacher the student has %s parameters, fewer than the %s it may have. "
            "A larger vocabulary would use them.", f"{count(best[2]):,}", f"{budget:,}",
        )  # fmt: skip
    return best[1], best[2]


def _depths(depth: int) -> list[int]:
    """Depths worth trying: all up to 4, then ever fewer."""
    return sorted({*range(1, min(depth, 4) + 1), *(max(round(depth * part / 6), 1) for part in range(1, 7))})


def _fits(
    teacher: PreTrainedModel, stack: Stack, blocks: int, budget: int, fixed: Mapping[str, int],
    vocabulary: int | None, ratio: float,
) -> Iterator[tuple[dict[str, int], PreTrainedModel]]:  # fmt: skip
    """Shapes of a depth near the budget: hidden sizes around it, each with the feed-forward size that fills it."""
    shallow = skeleton(teacher, [Cut(stack, tuple(range(blocks)))]) if blocks < stack.depth else teacher
    sizes = current_widths(teacher)
    apart = "intermediate_size" in sizes  # of some architectures it follows the hidden size

    @functools.cache
    def model(hidden: int, units: int) -> tuple[dict[str, int], PreTrainedModel]:
        shape = {"hidden_size": hidden, **({"intermediate_size": units} if apart else {}), **fixed}
        if not isinstance(teacher.config.to_dict().get("head_dim"), int):
            shape.setdefault("num_attention_heads", _heads(sizes, hidden))
        made = built(shallow, narrowed_entries(shallow, shape))
        made = built(made, _fewer_tokens(made, vocabulary)) if vocabulary else made
        made.tie_weights()
        return shape, made

    def natural(hidden: int) -> int:
        most = sizes.get("intermediate_size", 1)
        return fixed.get("intermediate_size", min(max(round(ratio * hidden), 1), most))

    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    choices = [fixed["hidden_size"]] if "hidden_size" in fixed else _hidden_sizes(teacher, sizes, fixed)
    low, high = 0, len(choices)
    while low < high:  # the first that is too large
        middle = (low + high) // 2
        if count(model(choices[middle], natural(choices[middle]))[1]) > budget:
            high = middle
        else:
            low = middle + 1
    multiples = [k for k, hidden in enumerate(choices) if hidden % head == 0]
    near = {low - 1, low, *[k for k in multiples if k < low][-1:], *[k for k in multiples if k >= low][:1]}
    for hidden in (choices[k] for k in near if 0 <= k < len(choices)):
        units = natural(hidden)
        if apart and "intermediate_size" not in fixed:
            ours, one = count(model(hidden, units)[1]), count(model(hidden, 1)[1])
            # Parameters of one unit of every block.
            each = (ours - one) / (units - 1) if units > 1 and ours > one else math.inf
            units = min(max(math.floor(units + (budget - ours) / each), 1), sizes["intermediate_size"])
        yield model(hidden, units)


def _hidden_sizes(teacher: PreTrainedModel, sizes: Mapping[str, int], fixed: Mapping[str, int]) -> list[int]:
    """Hidden sizes that the architecture allows, in increasing order."""
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    left = "intermediate_size" in sizes and "intermediate_size" not in fixed
    step = _STEP if left else 2  # only the hidden size is left to fill the budget
    whole = sizes["hidden_size"]
    choices = sorted({*range(2, min(whole, 64), 2), *range(step, whole + 1, step), *range(head, whole + 1, head)})
    choices = [hidden for hidden in choices if _heads(sizes, hidden) <= sizes["num_attention_heads"]]
    # At that size ELECTRA and OPT would lose the layer between embeddings and blocks.
    narrow = {getattr(teacher.config, name, whole) for name in ("embedding_size", "word_embed_proj_dim")} - {whole}
    choices = [hidden for hidden in choices if hidden not in narrow]
    if hasattr(teacher.config, "trigram_input"):  # MobileBERT, whose head has the rows that its blocks are wider
        choices = [hidden for hidden in choices if hidden > teacher.config.embedding_size]
    if _rotary_heads(teacher):
        part = _rotary_part(teacher)
        turned = {hidden: int(hidden // _heads(sizes, hidden) * part) for hidden in choices}
        choices = [hidden for hidden in choices if turned[hidden] and turned[hidden] % 2 == 0]
    groups = getattr(teacher.config, "num_conv_pos_embedding_groups", 1)  # of Wav2Vec2's convolution over positions
    choices = [hidden for hidden in choices if hidden % groups == 0]
    if "num_attention_heads" in fixed:
        choices = [hidden for hidden in choices if hidden % fixed["num_attention_heads"] == 0
                   and hidden <= head * fixed["num_attention_heads"]]  # fmt: skip
    if isinstance(teacher.config.to_dict().get("head_dim"), int):  # heads stay, and configs want them to divide
        heads = fixed.get("num_attention_heads", sizes["num_attention_heads"])
        choices = [hidden for hidden in choices if hidden % heads == 0]
    return choices


def _heads(sizes: Mapping[str, int], hidden: int) -> int:
    """The fewest heads that divide a hidden size, are not larger than the teacher's, and share key-value heads as its
    heads do; more than the hidden size if there are none.
    """
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    groups = sizes.get("num_key_value_heads", sizes["num_attention_heads"])
    sharing = sizes["num_attention_heads"] // groups if groups > 1 else 1
    possible = (heads for heads in range(-(-hidden // head), hidden + 1) if hidden % heads == heads % sharing == 0)
    return next(possible, max(hidden, sizes["num_attention_heads"]) + 1)


def _rotary_heads(teacher: PreTrainedModel) -> bool:
    """Whether positions turn the features of heads in pairs, and the head size follows the hidden size."""
    if isinstance(teacher.config.to_dict().get("head_dim"), int):
        return False
    rotary = any("rotary" in type(module).__name__.lower() for module in teacher.modules())
    return rotary or any(hasattr(teacher.config, name) for name in ("rotary_dim", "rotary_value"))  # GPT-J, RoFormer


def _rotary_part(teacher: PreTrainedModel) -> float:
    """The share of a head's features that positions turn, below 1 in Phi and StableLM."""
    config: Any = teacher.config
    found = [getattr(config, name, None) for name in ("partial_rotary_factor", "rotary_pct")]
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict):
        found.append(parameters.get("partial_rotary_factor"))
    return next((float(value) for value in found if isinstance(value, (int, float))), 1.0)


def _fewer_tokens(model: PreTrainedModel, size: int) -> dict[str, Any]:
    """Config entries for another number of tokens, among which the old padding id need not be."""
    entries = vocabulary_entries(model, size)
    for section in [entries, *(value for value in entries.values() if isinstance(value, dict))]:
        if isinstance(pad := section.get("pad_token_id"), int) and pad >= size:
            section["pad_token_id"] = 0
    return entries


def where_parameters_go(model: Any) -> str:
    """One line: how many parameters the model has, and how many in embeddings, blocks and head."""
    blocks = {
        id(p) for module in model.modules() if isinstance(module, nn.ModuleList) for p in module.parameters()
    }  # fmt: skip
    base = {id(p) for p in model.base_model.parameters()}
    parts = {"embeddings": 0, "blocks": 0, "head": 0}
    for parameter in model.parameters():
        part = "blocks" if id(parameter) in blocks else "embeddings" if id(parameter) in base else "head"
        parts[part] += parameter.numel()
    total = sum(parts.values())
    shares = ", ".join(f"{name} {number:,} ({number / total:.0%})" for name, number in parts.items())
    return f"{total:,} parameters: {shares}"
