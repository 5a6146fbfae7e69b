"""Which blocks of a teacher a student keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.heads import forward_inputs, in_eval_mode
from hf_distill.mapping import LayerMapping, layers_of

LayerChoice = Literal["uniform", "first", "last", "importance"]
CHOICES = get_args(LayerChoice)


def choose_blocks(
    teacher: PreTrainedModel,
    depth: int,
    number: int,
    choice: LayerChoice = "uniform",
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
) -> tuple[int, ...]:
    """The blocks to keep, from 0, in increasing order.

    `"uniform"`, `"first"` and `"last"` are those that the [`LayerMapping`] of that name pairs with the student's;
    `"importance"` are those that change what passes through them most ([`block_influence`]).

    Raises:
        ValueError: If the choice is unknown, or importance is asked for without calibration batches.
    """
    if choice not in CHOICES:
        raise ValueError(f"layer_choice must be one of {CHOICES}, got {choice!r}.")
    if choice != "importance":
        mapping = getattr(LayerMapping, choice)()
        pairs = mapping.resolve(student_layers=number, teacher_layers=depth)
        return tuple(layers_of(theirs)[0] - 1 for _, theirs in pairs)
    if calibration is None:
        raise ValueError(
            "layer_choice='importance' measures what each block does on batches of the teacher's inputs. Pass some as "
            "calibration=."
        )
    scores = block_influence(teacher, calibration)
    if len(scores) != depth:
        raise ValueError(
            f"{type(teacher).__name__} returns the hidden states of {len(scores)} blocks, but {depth} are to be cut: "
            "their importance cannot be measured. Pass layers= or another layer_choice."
        )
    best = scores.argsort(descending=True, stable=True)[:number]
    return tuple(sorted(best.tolist()))


@torch.no_grad()
def block_influence(teacher: PreTrainedModel, calibration: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """One minus the mean cosine similarity of what enters a block and what leaves it, over all real tokens.

    Shape:
        (blocks,), each in [0, 2].

    References:
        Men et al. (2024), ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, equation 1.
    """
    sums, tokens = torch.zeros(0, dtype=torch.float64), 0
    with in_eval_mode(teacher):
        for batch in calibration:
            inputs = forward_inputs(teacher, batch)
            states = teacher(**inputs, output_hidden_states=True).hidden_states
            mask = inputs.get("attention_mask")
            real = torch.ones(states[0].shape[:-1], dtype=torch.bool) if mask is None else mask.bool().cpu()
            change = [1 - F.cosine_similarity(a.double(), b.double(), dim=-1).cpu()[real] for a, b in pairwise(states)]
            sums = torch.stack([values.sum() for values in change]) + (sums if len(sums) else 0)
            tokens += int(real.sum())
    if not tokens:
        raise ValueError("calibration has no batches.")
    return sums / tokens
