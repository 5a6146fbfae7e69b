"""Running the blocks of a model on one row of all real tokens, where no padding is.

Embeddings and head see the batch as it is, (B, T). In front of the first block the real tokens are taken out of it, in
one row (1, N, H); attention runs for each text by itself, texts of one length together; behind the last block they are
put back, with zeros at padding. All weights and their gradients are passed over once, whatever the lengths. Whether a
model works that way is tried on the model in hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.activations import Head
from hf_distill.attention_twin import AttentionTwin, attention_configs
from hf_distill.batching import LOGITS, answers_that_count, is_close, run_without_padding, with_masked_ends
from hf_distill.heads import layerdrop

# What one more length in a batch costs, in tokens: calling attention once more in every block. Measured on a CPU: 0 to
# 8 for 4 x 312 and 6 x 768, 6 to 14 for 2 x 128, 21 to 25 for 2 x 64.
OVERHEAD = 10.0
# Relative difference of an answer or a gradient up to which packing is said to change nothing; less: rounding.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass(eq=False)
class Layout:
    """Where the real tokens of a batch go: row after row, those of one length beside each other.

    Attributes:
        where: Position of each packed token in the flattened batch. Shape: (N,).
        runs: How many rows there are of each length, and the length, in their order in the pack.
        shape: (B, T), of the batch.
    """

    where: Tensor
    runs: list[tuple[int, int]]
    shape: tuple[int, int]
    _packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Layout | None:
        """The layout of a batch; `None` for a single row, and unless every row is padded on the right alone.

        On the left there may be a head that reads the first position.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or mask is None or ids.ndim != 2 or mask.shape != ids.shape or len(ids) < 2:
            return None
        real = mask != 0
        if not bool(real[:, 0].all()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
            return None
        lengths, order = real.sum(1).sort(stable=True)
        rows, columns = real[order].nonzero(as_tuple=True)
        values, counts = lengths.unique_consecutive(return_counts=True)
        runs = list(zip(counts.tolist(), values.tolist(), strict=True))
        return cls(order[rows] * ids.shape[1] + columns, runs, (ids.shape[0], ids.shape[1]))

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return len(self.where)

    def pack(self, value: Any) -> Any:
        """The real tokens of every (B, T, ...) or (1, T, ...) tensor in a block's arguments; all else as it is."""
        if isinstance(value, dict):
            return {key: self.pack(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.pack(item) for item in value)
        if not isinstance(value, Tensor) or value.shape[:2] not in (self.shape, (1, self.shape[1])):
            return value
        if id(value) not in self._packed:  # every block gets the same rotary positions
            rows = value.expand(self.shape[0], *value.shape[1:]).flatten(0, 1)
            self._packed[id(value)] = value, rows.index_select(0, self.where)[None]
        return self._packed[id(value)][1]

    def unpack(self, packed: Tensor) -> Tensor:
        """Back to the batch, zeros at padding. Shape: (1, N, ...) -> (B, T, ...)."""
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        return flat.index_copy(0, self.where, packed[0]).unflatten(0, self.shape)

    def forget(self) -> None:
        """Let go of the tensors of a forward that is over."""
        self._packed.clear()

    def is_packed(self, value: Any) -> bool:
        """Whether this is a row of all real tokens."""
        return isinstance(value, Tensor) and value.shape[:2] == (1, self.tokens)


_active: ContextVar[Layout | None] = ContextVar("active", default=None)


def run_on_real_tokens(
    model: nn.Module, inputs: Mapping[str, Any], arguments: Mapping[str, Any], head: Head, stack: str | None
) -> Any:
    """`model(**inputs, **arguments)`, packed where the model can be and that is cheaper, else `run_without_padding`.

    Args:
        model: A Transformers model.
        inputs: A collated batch.
        arguments: What else the model is called with.
        head: What its logits mean.
        stack: Name of the list of blocks to pack ([`find_stack`]); `None` for a model that cannot be packed.
    """
    layout = None if stack is None or _runs_blocks_again(model) else Layout.of(inputs)
    if layout is None:
        return run_without_padding(model, inputs, arguments, head)
    if layout.tokens + OVERHEAD * len(layout.runs) >= layout.shape[0] * layout.shape[1]:
        return model(**inputs, **arguments)
    return _run_packed(model, inputs, arguments, stack or "", layout)


def find_stack(model: nn.Module, inputs: Mapping[str, Any], arguments: Mapping[str, Any], head: Head) -> str | None:
    """Name of the model's list of blocks, if packing them gives the same answers and the same gradient.

    Tried on a batch whose ends are masked. Models that mix positions in other ways than by Transformers' attention
    interface, or whose heads look at padding, keep it.

    Args:
        model: A Transformers model in eval mode.
        inputs: A collated batch of at least two rows.
        arguments: What else it is called with.
        head: What its logits mean.
    """
    config: Any = getattr(model, "config", None)
    masked = with_masked_ends(inputs, getattr(config, "pad_token_id", None) or 0)
    layout = None if masked is None else Layout.of(masked)
    own = {config._attn_implementation_internal for config in attention_configs(model)}
    in_chunks = getattr(config, "chunk_size_feed_forward", 0)  # whose number must divide the tokens
    unsupported = (
        in_chunks or layerdrop(config) or arguments.get("output_attentions") or not own <= {"sdpa", "eager", None}
    )
    if layout is None or masked is None or unsupported:
        return None
    depth = getattr(config, "num_hidden_layers", None)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    for name in names:
        try:
            if _is_the_same_packed(model, masked, arguments, head, name):
                return name
        except Exception:  # whatever a model of another kind raises when its blocks see one row
            continue
    return None


def _is_the_same_packed(
    model: nn.Module, inputs: Mapping[str, Any], arguments: Mapping[str, Any], head: Head, stack: str
) -> bool:
    layout = Layout.of(inputs)
    whole, slopes = _answers_and_gradient(model, inputs, head, lambda: model(**inputs, **arguments))
    packed, ours = _answers_and_gradient(
        model, inputs, head, lambda: _run_packed(model, inputs, arguments, stack, layout)  # type: ignore[arg-type]
    )  # fmt: skip
    largest = max((float(slope.float().norm()) for slope in slopes), default=0.0)
    return all(
        is_close(a, b, _TOLERANCES.get(b.dtype, 5e-2), floor)
        for some, others, floor in ((packed, whole, 1e-6), (ours, slopes, 1e-3 * _TOLERANCES[torch.float32] * largest))
        for a, b in zip(some, others, strict=True)
    )


def _answers_and_gradient(
    model: nn.Module, inputs: Mapping[str, Any], head: Head, forward: Callable[[], Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The logits that count, and the gradient of a sum in which each of them counts differently."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.set_grad_enabled(bool(weights)):
        answers = answers_that_count(forward(), inputs, head)
        if not weights:
            return answers, []
        total = torch.stack([(x * _factors(x)).sum() for x in answers]).sum()
    slopes = torch.autograd.grad(total, weights, allow_unused=True)
    return answers, [slope for slope in slopes if slope is not None]


def _factors(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.arange(1, x.numel() + 1, device=x.device, dtype=dtype).sin().view_as(x)


def _run_packed(
    model: nn.Module, inputs: Mapping[str, Any], arguments: Mapping[str, Any], stack: str, layout: Layout
) -> Any:
    blocks: Any = model.get_submodule(stack)
    with _twin.standing_in(model), _packed_between(blocks[0], blocks[-1], list(blocks), layout):
        token = _active.set(layout)
        try:
            outputs = model(**inputs, **arguments)
        finally:
            _active.reset(token)
            layout.forget()
    for name, value in outputs.items():
        if name == "hidden_states" and value:  # collected between blocks
            outputs[name] = tuple(layout.unpack(x) if layout.is_packed(x) else x for x in value)
        elif name not in (*LOGITS, "hidden_states") and value is not None and value != ():
            raise ValueError(f"{type(outputs).__name__}.{name} cannot be unpacked.")
    return outputs


@contextlib.contextmanager
def _packed_between(first: nn.Module, last: nn.Module, blocks: list[nn.Module], layout: Layout) -> Iterator[None]:
    """Pack what enters the first block and what else the blocks are given; unpack what leaves the last."""

    def into(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if _active.get() is not layout:  # another thread
            return None
        state = args[0] if args else kwargs["hidden_states"]
        if block is first:  # that of a later one is packed already, and may look like a row of the batch
            if state.shape[:2] != layout.shape:
                raise ValueError(f"The first block gets a state of shape {tuple(state.shape)}, not that of the batch.")
            state = layout.pack(state)
        others = layout.pack({key: value for key, value in kwargs.items() if key != "hidden_states"})
        return ((state, *layout.pack(args[1:])), others) if args else ((), {**others, "hidden_states": state})

    def out_of(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if _active.get() is not layout:
            return output
        if isinstance(output, tuple):
            return layout.unpack(output[0]), *output[1:]
        return layout.unpack(output)

    handles = [block.register_forward_pre_hook(into, with_kwargs=True) for block in blocks]
    handles.append(last.register_forward_hook(out_of))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attend(
    own: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's own attention, for the texts of each length. Shape: (1, A, N, D) -> (1, N, A, D)."""
    layout = _active.get()
    if layout is None:  # another thread
        return own(module, query, key, value, attention_mask, *args, **kwargs)
    scores = [x for x in kwargs.values() if isinstance(x, Tensor) and x.ndim > 2]
    pattern = attention_mask is None or (len(attention_mask) == 1 and attention_mask.shape[-2] == layout.shape[1])
    if scores or not pattern or key.shape[2] != layout.tokens:
        raise ValueError("Attention reads more than queries, keys, values and a pattern that all texts share.")
    outputs = []
    sizes = [rows * length for rows, length in layout.runs]
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    for (rows, length), part in zip(layout.runs, parts, strict=True):
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        stacked = (x[0].unflatten(1, (rows, length)).transpose(0, 1) for x in part)  # (n, A, L, D) each
        outputs.append(own(module, *stacked, mask, *args, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None], None


def _mask(own: Callable[..., Any], **arguments: Any) -> Any:
    """The pattern that all texts share: who may see whom, padding left out. Shape: (1, 1, T, T), or `None`."""
    if _active.get() is None:
        return own(**arguments)
    return own(**{**arguments, "batch_size": 1, "attention_mask": None})


def _runs_blocks_again(model: nn.Module) -> bool:
    """Activation checkpointing would run blocks in the backward pass, where no twin stands in for attention."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


_twin = AttentionTwin("hf_distill_packing_", _attend, _mask)
