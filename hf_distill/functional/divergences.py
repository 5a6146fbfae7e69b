"""How far two distributions lie apart, position by position."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_distill.functional.precision import at_least_fp32, require_same_shape


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's log q and the teacher's log p."""
    require_same_shape(student_logits, teacher_logits)
    log_q, log_p = (
        F.log_softmax(at_least_fp32(logits) if temperature == 1.0 else at_least_fp32(logits) / temperature, dim=-1)
        for logits in (student_logits, teacher_logits)
    )
    return log_q, log_p


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, both sides as log-probabilities (..., V)."""
    return cast(Tensor, _KullbackLeibler.apply(log_p, log_q))


class _KullbackLeibler(torch.autograd.Function):
    """The plain sum of p log(p / q) cancels for close distributions: in fp32 it was measured up to 40 % off. Its
    gradient is precise, so only the value is computed otherwise: p log(p / q) - p + q adds up to the same, has no
    negative terms, and is p (exp(d) - 1 - d) for d = log(q / p).
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, d = log_p.exp(), log_q - log_p
        sums = torch.expm1(d).sub_(d).mul_(p).sum(-1)
        # Where p is 0, as of a class that is masked or that a stored answer leaves out, p d is 0 whatever d is: also
        # infinite, or no number. From d = 80 on exp(d) is about to overflow, and p to vanish.
        if d.numel() and not bool((d.amax() <= 80.0) & sums.isfinite().all()):
            d = d.masked_fill(p == 0.0, 0.0)
            far = (d > 80.0) | (p == 0.0)
            sums = torch.where(far, log_q.exp() - p - p * d, (torch.expm1(d) - d) * p).sum(-1)
        ctx.save_for_backward(p, d if ctx.needs_input_grad[0] else None)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (p, d), g = ctx.saved_tensors, upstream[0].unsqueeze(-1)
        of_log_p = None if d is None else (1.0 - d).mul_(p).mul_(g)
        return of_log_p, p * -g if ctx.needs_input_grad[1] else None


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), for a share strictly between 0 and 1."""
    part = torch.tensor(share, dtype=log_p.dtype, device=log_p.device)
    # Finite where a class is masked: of two -inf the mixture would have no gradient.
    log_p, log_q = (each.clamp(min=torch.finfo(each.dtype).min) for each in (log_p, log_q))
    return torch.logaddexp(log_p + part.log(), log_q + (1 - part).log())


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL(teacher || student) at each position, in nats, times temperature².

    Both sides are softened by the temperature; the square keeps the size of the gradient comparable across
    temperatures (Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", section 2).

    Shape:
        (..., V), (..., V) -> (...).

    >>> x = torch.randn(2, 3, 5)
    >>> kl_divergence(x, x).abs().max().item() < 1e-6
    True
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q) * temperature**2


def reverse_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Reverse KL(student || teacher) at each position, in nats, times temperature².

    Mode-seeking: the student may ignore answers that the teacher finds unlikely (Gu et al., 2024, "MiniLLM", section
    2).

    Shape:
        (..., V), (..., V) -> (...).

    >>> a, b = torch.randn(2, 5), torch.randn(2, 5)
    >>> torch.equal(reverse_kl_divergence(a, b), kl_divergence(b, a))
    True
    """
    return kl_divergence(teacher_logits, student_logits, temperature)


def jensen_shannon_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Generalised Jensen-Shannon divergence at each position, in nats, times temperature².

    `beta * KL(teacher || M) + (1 - beta) * KL(student || M)` with the mixture `M = beta * teacher + (1 - beta) *
    student` (Agarwal et al., 2024, "On-Policy Distillation of Language Models", equation 1). `beta=0` means forward KL
    and `beta=1` reverse KL, as in TRL. Between them the value tends to 0 at both ends (it behaves like `beta * forward
    KL` near 0), so the two ends are not limits of the interior. TRL's function of the same name lacks the temperature²
    factor.

    Shape:
        (..., V), (..., V) -> (...).

    Raises:
        ValueError: If `beta` is outside [0, 1].

    >>> a, b = torch.randn(2, 5), torch.randn(2, 5)
    >>> torch.allclose(jensen_shannon_divergence(a, b), jensen_shannon_divergence(b, a), atol=1e-6)
    True
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1] (0 is forward KL, 1 reverse KL), got {beta}.")
    if beta == 0.0:
        return kl_divergence(student_logits, teacher_logits, temperature)
    if beta == 1.0:
        return reverse_kl_divergence(student_logits, teacher_logits, temperature)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    log_mixture = _log_mixture(log_p, log_q, beta)
    divergence = beta * _kl(log_p, log_mixture) + (1 - beta) * _kl(log_q, log_mixture)
    return divergence * temperature**2


def skewed_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """Skewed forward KL at each position, in nats, times temperature².

    `KL(teacher || skew * teacher + (1 - skew) * student)`. The mixture keeps the ratio below 1 / skew where the
    student has missed an answer of the teacher's, and with it value and gradient (Ko et al., 2024, "DistiLLM", section
    3). `skew=0` is forward KL; towards 1 the value falls to 0 as `(1 - skew)²`. Before the temperature's factor it
    lies in [0, -log(skew)].

    Shape:
        (..., V), (..., V) -> (...).

    Raises:
        ValueError: If `skew` is outside [0, 1).

    >>> a, b = torch.randn(2, 5), torch.randn(2, 5)
    >>> torch.equal(skewed_kl_divergence(a, b, skew=0.0), kl_divergence(a, b))
    True
    """
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew must lie in [0, 1) (0 is the plain divergence, at 1 nothing is left), got {skew}.")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, skew) if skew > 0 else log_q) * temperature**2


def skewed_reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """Skewed reverse KL at each position, in nats, times temperature².

    `KL(student || skew * student + (1 - skew) * teacher)`, skewed KL with the two sides exchanged (Ko et al., 2024,
    "DistiLLM", section 3). `skew=0` is reverse KL.

    Shape:
        (..., V), (..., V) -> (...).

    Raises:
        ValueError: If `skew` is outside [0, 1).

    >>> a, b = torch.randn(2, 5), torch.randn(2, 5)
    >>> torch.equal(skewed_reverse_kl_divergence(a, b, skew=0.0), reverse_kl_divergence(a, b))
    True
    """
    return skewed_kl_divergence(teacher_logits, student_logits, temperature, skew)


def total_variation_distance(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Half the sum of |teacher - student| over the classes at each position, times temperature.

    The largest difference of the two probabilities of any event (Wen et al., 2023, "f-Divergence Minimization for
    Sequence-Level Knowledge Distillation", section 3). It is of first order in the difference of the logits, where the
    KLs are of second, so one temperature keeps its gradient comparable. Before that factor it lies in [0, 1].

    Shape:
        (..., V), (..., V) -> (...).

    >>> total_variation_distance(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))
    tensor([1.])
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) * (temperature / 2)


def attention_kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two distributions over the last dimension, given as probabilities, in nats.

    Shape:
        (..., T), (..., T) -> (...).

    Raises:
        ValueError: If the shapes differ.

    >>> p = torch.tensor([0.5, 0.5, 0.0])
    >>> attention_kl_divergence(p, p)
    tensor(0.)
    """
    require_same_shape(student, teacher)
    # A key that the mask excludes has probability 0 on both sides, and adds 0.
    tiny = torch.finfo(torch.float32).tiny
    p, q = at_least_fp32(teacher), at_least_fp32(student)
    return _kl(p.clamp(min=tiny).log(), q.clamp(min=tiny).log())


def binary_logits(logits: Tensor) -> Tensor:
    """Independent yes/no logits as two-class logits `[0, z]`, whose softmax is `[1 - sigmoid(z), sigmoid(z)]`.

    With it every divergence over classes serves multi-label heads too, label by label.

    Shape:
        (...) -> (..., 2).

    >>> z = torch.tensor([0.3, -2.0])
    >>> torch.allclose(binary_logits(z).softmax(-1)[..., 1], z.sigmoid())
    True
    """
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)
