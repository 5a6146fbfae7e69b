"""Letting a model go on from prompts of different length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.alignment import maximum_length
from hf_distill.heads import core_model
from hf_distill.teachers.placement import execution_device


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int | None = None,
    **kwargs: Any,
) -> list[list[int]]:
    """What a model writes after each prompt, up to and with the token that ends a text.

    Prompts are padded on the left for a decoder, whose next token follows the last one, and on the right for an
    encoder. The model is asked in eval mode and left as it was.

    Args:
        model: A causal language model, or an encoder-decoder.
        prompts: Token ids.
        max_new_tokens: Most tokens of a completion.
        pad_token_id: What to pad with.
        kwargs: As for `generate`; what is not set is the model's own `generation_config`.

    Raises:
        ValueError: If a prompt is empty, or it or its completion is longer than the model has positions.
    """
    require_prompts(prompts)
    core = core_model(model)
    encoder_decoder = bool(getattr(core.config, "is_encoder_decoder", False))
    _require_room(core, max(map(len, prompts)), max_new_tokens, encoder_decoder)
    ends = _ids(kwargs.get("eos_token_id", core.generation_config.eos_token_id))
    pad = next((i for i in (pad_token_id, core.generation_config.pad_token_id, *sorted(ends)) if i is not None), 0)
    ids, mask = _padded(prompts, pad, left=not encoder_decoder)
    device, was_training = execution_device(model), model.training
    model.eval()
    try:
        written: Any = core.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, pad_token_id=pad,
            **{"use_cache": True, **kwargs},
        )  # fmt: skip
    finally:
        model.train(was_training)
    start = 1 if encoder_decoder else ids.shape[1]  # after what a decoder begins with
    return [_until_end(row, ends, pad) for row in written[:, start:].tolist()]


def require_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts without a token.

    Raises:
        ValueError: If there is one.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("A prompt is empty: there is nothing to go on from. Leave it out, or begin it with a token.")


def _require_room(core: Any, prompt: int, new: int, encoder_decoder: bool) -> None:
    """Prompt and completion stand one after the other, or each in a stack of its own."""
    most = maximum_length(core.config)
    if hasattr(core.config.get_text_config(), "relative_attention_num_buckets"):
        return  # T5 has no end, whatever its config calls n_positions
    if most is not None and (max(prompt, new) if encoder_decoder else prompt + new) > most:
        raise ValueError(
            f"The longest prompt has {prompt} tokens, and with {new} new ones that is more than the {most} positions "
            f"of {type(core).__name__}. Set fewer max_new_tokens, or shorten the prompts."
        )


def _padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask. Shape: (B, T) each."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(list(row)), 1
    return ids, mask


def _until_end(ids: list[int], ends: set[int], pad: int) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    if end is None:  # stopped by something else, or by the limit
        end = len(ids)
        while end and ids[end - 1] == pad and pad not in ends:
            end -= 1
    return ids[:end]


def _ids(one_or_several: Any) -> set[int]:
    if one_or_several is None:
        return set()
    return {one_or_several} if isinstance(one_or_several, int) else {int(token) for token in one_or_several}
