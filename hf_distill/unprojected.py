"""Logits that are not computed yet: hidden states and the output head that would make logits of them.

At a vocabulary of 150 000 the logits of a thousand tokens, their softmaxes and their gradients are what runs out of
memory first. They are computed here for some positions at a time, together with whatever a loss makes of them and with
its gradient, and forgotten again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_distill.functional import at_least_fp32
from hf_distill.top_k import TopKLogits

# Logits of one model that are held at a time: 32 MB of them in fp32. Fewer make the products with the head's weight
# thinner and slower.
CHUNK = 2**23
# Of these on a CPU so many at a time go through softmaxes, logarithms and differences: 2 MB, so that they stay in its
# cache.
CACHED = 2**19


@dataclass(frozen=True)
class UnprojectedLogits:
    """What an output head would read, and the head: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Behaves as the logits do where positions are selected; `materialise` computes them.

    Attributes:
        hidden: (..., H), in the precision that the head computes in.
        weight: (V, H).
        bias: (V,), if the head has one.
        scale: Factor of the logits (Cohere, Granite).
        softcap: Bound of their size (Gemma 2); `None` where they have none.

    >>> logits = UnprojectedLogits(torch.ones(2, 5, 3), torch.ones(7, 3), scale=0.5)
    >>> logits.shape, logits[:, :-1].shape, logits.first_classes(4).materialise().shape
    (torch.Size([2, 5, 7]), torch.Size([2, 4, 7]), torch.Size([2, 5, 4]))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits: (..., V)."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    def __getitem__(self, positions: Any) -> UnprojectedLogits:
        """The logits at some positions; classes cannot be selected this way."""
        return replace(self, hidden=self.hidden[positions])

    def first_classes(self, count: int) -> UnprojectedLogits:
        """Without the last classes, such as the padding of a vocabulary."""
        bias = None if self.bias is None else self.bias[:count]
        return replace(self, weight=self.weight[:count], bias=bias)

    def materialise(self) -> Tensor:
        """The logits themselves. Shape: (..., V)."""
        weight, bias = _as(self.hidden.dtype, self.weight, self.bias)
        return finished(F.linear(self.hidden, weight, bias), self.scale, self.softcap)


Logits = Tensor | UnprojectedLogits | TopKLogits


def finished(linear: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What a head does to the output of its linear layer.

    Shape:
        (..., V) -> (..., V).
    """
    scaled = linear if scale == 1.0 else linear * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def first_classes(logits: Logits, count: int) -> Logits:
    """Logits without the last classes. Shape: (..., V) -> (..., count)."""
    if logits.shape[-1] <= count:
        return logits  # a slice of everything would still cost a copy in the backward pass
    return logits[..., :count] if isinstance(logits, Tensor) else logits.first_classes(count)


def materialised(logits: Logits) -> Tensor:
    """Logits as a tensor. Shape: (..., V)."""
    if isinstance(logits, TopKLogits):
        raise TypeError("Of these logits only the likeliest classes are known.")
    return logits.materialise() if isinstance(logits, UnprojectedLogits) else logits


def computed(logits: Logits) -> Tensor | TopKLogits:
    """Logits as a tensor, or what is known of them."""
    return logits if isinstance(logits, TopKLogits) else materialised(logits)


Computed = Tensor | TopKLogits
Terms = Callable[[Tensor, Computed | None, slice], Tensor]
Rows = Callable[[slice], Computed | None]


def sum_over_chunks(
    terms: Terms, student: UnprojectedLogits, teacher: Rows, weights: Sequence[float], chunk: int | None = None
) -> Tensor:
    """`terms(student.materialise(), teacher(all rows), all rows)`, some rows at a time.

    The gradient is computed in the forward pass, chunk by chunk, while the logits are there, and is accumulated in
    fp32. For that it must be known what will become of the terms: they must be summed with `weights`, up to a common
    factor, before the backward pass.

    Args:
        terms: Makes K numbers of some rows: the student's logits (n, V), at least in fp32, the teacher's, and which
            rows they are. Its result for all rows is the sum of its results for parts of them.
        student: Logits of N rows.
        teacher: Computes the teacher's logits of some rows, if there are any.
        weights: Weight of each term in the sum that is minimised, K of them.
        chunk: How many logits to hold at a time; `CHUNK` by default.

    Shape:
        (N, V) -> (K,).

    Raises:
        RuntimeError: In the backward pass, if the terms were summed with other weights.

    >>> logits = UnprojectedLogits(torch.randn(50, 3), torch.randn(7, 3))
    >>> squares = lambda ours, theirs, rows: ours.square().sum()[None]
    >>> whole = squares(logits.materialise(), None, slice(None))
    >>> torch.allclose(sum_over_chunks(squares, logits, lambda rows: None, [1.0], chunk=70), whole)
    True
    """
    hidden = student.hidden
    factors = torch.tensor(weights, dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)
    sweep = _Sweep(terms, teacher, factors, student, chunk or CHUNK, torch.is_grad_enabled())
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(Tensor, _SumOverChunks.apply(hidden, student.weight, student.bias, sweep))


@dataclass(frozen=True)
class _Sweep:
    terms: Terms
    teacher: Rows
    factors: Tensor
    head: UnprojectedLogits
    chunk: int
    learns: bool

    def steps(self, start: int, end: int, chunk: int) -> Iterator[slice]:
        """Rows from `start` to `end`, as many at a time as have `chunk` logits."""
        rows = max(1, chunk // max(1, len(self.head.weight)))
        for first in range(start, end, rows):
            yield slice(first, min(first + rows, end))

    def differentiate(self, linear: Tensor, part: slice, learns: bool) -> Tensor:
        """The terms of one chunk, whose head's linear layer has returned `linear`; its gradient takes its place."""
        theirs, total = self.teacher(part), torch.zeros_like(self.factors)
        for rows in self.steps(0, len(linear), CACHED if linear.device.type == "cpu" else self.chunk):
            leaf = linear[rows].detach().requires_grad_(learns)
            where = slice(part.start + rows.start, part.start + rows.stop)
            with torch.set_grad_enabled(learns):
                ours = finished(leaf, self.head.scale, self.head.softcap)
                values = self.terms(ours, None if theirs is None else theirs[rows], where)
                weighted = (values * self.factors).sum()
            if learns:
                linear[rows] = torch.autograd.grad(weighted, leaf)[0]
            total += values.detach()
        return total


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: _Sweep) -> Tensor:
        gradients = [
            _zeros(x) if x is not None and sweep.learns and wanted else None
            for x, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        learns = any(gradient is not None for gradient in gradients)
        compute_weight, compute_bias = _as(hidden.dtype, weight, bias)
        total = torch.zeros_like(sweep.factors)
        for part in sweep.steps(0, len(hidden), sweep.chunk):
            linear = at_least_fp32(F.linear(hidden[part], compute_weight, compute_bias))
            total += sweep.differentiate(linear, part, learns)
            if learns:
                _accumulate(gradients, linear, hidden[part], compute_weight, part)
            del linear  # before the next one is made
        ctx.save_for_backward(sweep.factors, *gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        factors, *gradients = ctx.saved_tensors
        common = _common_factor(upstream[0], factors)
        scaled = [_scaled(gradient, common, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None)


def _accumulate(
    gradients: Sequence[Tensor | None], gradient: Tensor, hidden: Tensor, weight: Tensor, part: slice
) -> None:
    """Add what one chunk's gradient (n, V) says about the hidden states, the weight and the bias."""
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias += gradient.sum(0)
    # fp16 has no room for gradients divided by the number of tokens; nothing has scaled them up yet.
    size = gradient.abs().amax().clamp(min=1e-30) if weight.dtype == torch.float16 else None
    low = (gradient if size is None else gradient / size).to(weight.dtype)
    if of_hidden is not None:
        of_hidden[part] = _times(low @ weight, size)
    if of_weight is not None and of_weight.dtype == low.dtype:
        of_weight.addmm_(low.T, hidden)  # no second tensor of the weight's size
    elif of_weight is not None:
        of_weight += _times(low.T @ hidden, size)


def _times(x: Tensor, size: Tensor | None) -> Tensor:
    return x if size is None else x.float() * size


def _common_factor(upstream: Tensor, factors: Tensor) -> float:
    """By how much the sum was scaled since the forward pass."""
    if not factors.any():
        return 0.0
    largest = factors.abs().argmax()
    common = upstream[largest] / factors[largest]
    if not torch.allclose(upstream, common * factors, rtol=1e-4):
        raise RuntimeError(
            f"The terms were to be summed with the weights {factors.tolist()}, up to a common factor, but their "
            f"gradients are {upstream.tolist()}. Give sum_over_chunks the weights of the sum that is minimised."
        )
    return float(common)


def _scaled(gradient: Tensor | None, common: float, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    return (gradient if common == 1.0 else gradient * common).to(dtype)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=at_least_fp32(x[:0]).dtype, device=x.device)


def _as(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)
