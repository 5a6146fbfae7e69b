"""The maths of distillation: pure functions on tensors, nothing masked, nothing averaged over positions.

Letters used in every shape of this package: B rows, T positions (tokens, patches, or spans' two ends), V classes
(labels or vocabulary), H hidden width, L layers, N selected positions. `...` stands for any leading dimensions.

Every function computes in fp32 whatever it is given: in bf16 a small divergence is mostly rounding noise.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's log q and the teacher's log p."""
    _require_same_shape(student_logits, teacher_logits)
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
        ctx.save_for_backward(p, d if ctx.needs_input_grad[0] else None)
        terms = torch.expm1(d).sub_(d).mul_(p)
        if d.numel() and bool(d.amax() > 80.0):  # exp(d) is about to overflow, and p to vanish
            terms = torch.where(d > 80.0, log_q.exp() - p - p * d, terms)
        return terms.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (p, d), g = ctx.saved_tensors, upstream[0].unsqueeze(-1)
        of_log_p = None if d is None else (1.0 - d).mul_(p).mul_(g)
        return of_log_p, p * -g if ctx.needs_input_grad[1] else None


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
    share = torch.tensor(beta, dtype=log_p.dtype, device=log_p.device)
    log_mixture = torch.logaddexp(log_p + share.log(), log_q + (1 - share).log())
    divergence = beta * _kl(log_p, log_mixture) + (1 - beta) * _kl(log_q, log_mixture)
    return divergence * temperature**2


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
    _require_same_shape(student, teacher)
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


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error averaged over the last dimension (FitNets, Romero et al., 2015, equation 3, per element).

    Shape:
        (..., H), (..., H) -> (...).

    Raises:
        ValueError: If the shapes differ; nothing is broadcast.

    >>> mean_squared_error(torch.zeros(2, 4), torch.ones(2, 4))
    tensor([1., 1.])
    """
    _require_same_shape(student, teacher)
    return (at_least_fp32(student) - at_least_fp32(teacher)).square().mean(-1)


def normalized_mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the two unit vectors, in [0, 4]; insensitive to the scale of either model.

    Patient knowledge distillation (Sun et al., 2019, equation 7). Equals `2 * cosine_distance`.

    Shape:
        (..., H), (..., H) -> (...).

    Raises:
        ValueError: If the shapes differ.

    >>> x = torch.randn(3, 8)
    >>> bool(normalized_mean_squared_error(5 * x, x).max() < 1e-6)
    True
    """
    _require_same_shape(student, teacher)
    return (F.normalize(at_least_fp32(student), dim=-1) - F.normalize(at_least_fp32(teacher), dim=-1)).square().sum(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of the angle between two vectors, in [0, 2] (DistilBERT, Sanh et al., 2019, section 2).

    Shape:
        (..., H), (..., H) -> (...).

    Raises:
        ValueError: If the shapes differ.

    >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]))
    tensor([2.])
    """
    _require_same_shape(student, teacher)
    return 1.0 - F.cosine_similarity(at_least_fp32(student), at_least_fp32(teacher), dim=-1)


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32; float64 stays float64, so that gradients can be checked.

    Shape:
        (...) -> (...).

    >>> at_least_fp32(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def _require_same_shape(student: Tensor, teacher: Tensor) -> None:
    # Broadcasting (B, 1, H) against (B, T, H) would silently average over the wrong thing.
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}. "
            "Compare the same positions and classes (Batch.predictions); project hidden states to one width "
            "(hf_distill.projection.Projection)."
        )
