"""Some classes by themselves, and all others as one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_distill.functional.precision import at_least_fp32

# Logarithm of the probability of nothing: finite, so that 0 times it is 0; its exponential is 0; fits into fp16.
LOG_OF_NOTHING = -1e4


def grouped_log_probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of k classes, and last of all other classes together.

    `log q[c]` for each chosen class, and `log(1 - sum of these q[c])`, which is summed up from the other classes and
    not by subtraction, so that a small rest is as precise as a large one. Where there are no others the last is -1e4.

    Args:
        logits: Of all V classes.
        classes: Indices of the chosen ones, without repetition.

    Shape:
        (..., V), (..., k) -> (..., k + 1).

    >>> z = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    >>> grouped_log_probabilities(z, torch.tensor([3, 2])).exp()
    tensor([0.4000, 0.3000, 0.3000])
    """
    return cast(Tensor, _Grouped.apply(at_least_fp32(logits), classes))


class _Grouped(torch.autograd.Function):
    """One exponential for value and gradient: plain operations would need four passes over all classes more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor) -> Tensor:
        largest = logits.amax(-1, keepdim=True)
        odds = (logits - largest).exp_()
        chosen = odds.gather(-1, classes)
        rest = odds.scatter_(-1, classes, 0.0).sum(-1, keepdim=True)
        total = rest + chosen.sum(-1, keepdim=True)
        ctx.save_for_backward(odds, classes, chosen, rest, total)
        there = rest > torch.finfo(rest.dtype).tiny
        of_rest = torch.where(there, rest.log() - total.log(), LOG_OF_NOTHING)
        return torch.cat([logits.gather(-1, classes) - largest - total.log(), of_rest], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        odds, classes, chosen, rest, total = ctx.saved_tensors
        of_chosen, of_rest = upstream[0][..., :-1], upstream[0][..., -1:]
        there = rest > torch.finfo(rest.dtype).tiny
        # What has no probability has no gradient, and so takes no part in the sum either.
        of_rest = torch.where(there, of_rest, 0.0)
        common = (of_chosen.sum(-1, keepdim=True) + of_rest) / total
        gradient = odds * (of_rest / torch.where(there, rest, 1.0) - common)
        return gradient.scatter_(-1, classes, of_chosen - chosen * common), None
