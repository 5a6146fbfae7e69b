"""Running only the first blocks of a teacher, where no loss reads what the others compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_distill.activations import Activations, Needs

# What a model raises that counts its blocks itself.
_MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def last_needed_block(needs: Needs) -> int | None:
    """Number of the last block whose output is read; `None` if that is the model's own last one, or (for queries, keys
    and values) where all blocks are counted.

    >>> last_needed_block(Needs(hidden_states=(0, 4), attentions=(2,)))
    4
    """
    if needs.logits or needs.qkv or needs.hidden_states is True or needs.attentions is True:
        return None
    return max((*needs.hidden_states, *needs.attentions), default=None)


class Shortener:
    """Runs a model without its last blocks, once that was shown to give the same answers.

    One block more than needed is run, so that a norm after the last block meets a block that nobody reads. The lists
    of blocks are those as long as the model is deep; the first question is answered both ways, and unless the two
    answers are the same bit for bit the model is always run whole.

    Args:
        depth: How many blocks the model has, as its config counts them.
    """

    def __init__(self, depth: int | None) -> None:
        self._depth = depth
        self._proved: dict[Needs, bool] = {}

    def run(self, model: nn.Module, needs: Needs, forward: Callable[[], Activations]) -> Activations:
        """`forward()` with as few blocks as give the same."""
        last = last_needed_block(needs)
        if last is None or self._depth is None or last + 1 >= self._depth or self._proved.get(needs) is False:
            return forward()
        if self._proved.get(needs):
            with _first_blocks(model, self._depth, last + 1):
                return forward()
        whole = forward()
        try:
            with _first_blocks(model, self._depth, last + 1) as shortened:
                self._proved[needs] = shortened and _equal(whole, forward())
        except _MISFITS:
            self._proved[needs] = False
        return whole


@contextmanager
def _first_blocks(model: nn.Module, depth: int, count: int) -> Iterator[bool]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    try:
        for name, blocks in lists.items():
            _put(model, name, nn.ModuleList(list(blocks)[:count]))
        yield bool(lists)
    finally:
        for name, blocks in lists.items():
            _put(model, name, blocks)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def _equal(ours: Activations, theirs: Activations) -> bool:
    pairs = [(ours.hidden_states, theirs.hidden_states), (ours.attentions, theirs.attentions)]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
