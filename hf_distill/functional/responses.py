"""Distances between two answers that look at single classes, or at pairs of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.functional.divergences import binary_logits, kl_divergence
from hf_distill.functional.precision import at_least_fp32, require_same_shape


def decoupled_kl_divergences(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two parts of forward KL(teacher || student) beside a target class, in nats, times temperature² each.

    TCKD, the KL of the binary distributions (target class, any other), and NCKD, the KL of the distributions over the
    other classes alone. With the teacher's probability p of the target class `KL = TCKD + (1 - p) * NCKD` (Zhao et
    al., 2022, "Decoupled Knowledge Distillation", section 3.1). Both are at least 0; with two classes NCKD is 0.

    Args:
        student_logits: The student's logits.
        teacher_logits: The teacher's.
        target: Index of the target class at each position.
        temperature: Divides the logits of both sides.

    Shape:
        (..., V), (..., V), (...) -> (...), (...).

    Raises:
        ValueError: If the shapes do not fit.

    >>> a, b, target = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0, 3])
    >>> tckd, nckd = decoupled_kl_divergences(a, b, target)
    >>> others = 1 - b.softmax(-1).gather(-1, target[:, None])[:, 0]
    >>> torch.allclose(tckd + others * nckd, kl_divergence(a, b), atol=1e-5)
    True
    """
    require_same_shape(student_logits, teacher_logits)
    if target.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"There must be one target class a position, {tuple(student_logits.shape[:-1])}, got targets of shape "
            f"{tuple(target.shape)}."
        )
    ours, theirs = (at_least_fp32(logits) / temperature for logits in (student_logits, teacher_logits))
    ours, our_others = _split(ours, target)
    theirs, their_others = _split(theirs, target)
    return kl_divergence(ours, theirs) * temperature**2, kl_divergence(our_others, their_others) * temperature**2


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of (target class, any other), (..., 2), and of the other classes, (..., V - 1)."""
    classes = logits.shape[-1]
    is_other = torch.arange(classes, device=logits.device) != target[..., None]
    others = logits[is_other].reshape(*target.shape, classes - 1)
    own = logits.gather(-1, target[..., None]).squeeze(-1)
    return torch.stack([own, others.logsumexp(-1)], dim=-1), others


def pairwise_ranking_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """How differently two answers rank pairs of classes, averaged over the pairs, in nats, times temperature².

    The margin between the logits of two classes says how probable it is that the one ranks above the other:
    sigmoid(margin / T). The value is KL(teacher || student) of these probabilities, which is RankNet's loss (Burges et
    al., 2005, "Learning to Rank using Gradient Descent", section 3) with the teacher's as targets, less their entropy.
    It is 0 where the student has the teacher's margins. With two classes it is forward KL.

    Args:
        student_logits: The student's logits.
        teacher_logits: The teacher's.
        temperature: Divides the margins of both sides.
        top_k: Rank only the classes that the teacher likes best; all if `None`, or if there are fewer. Pairs grow with
            the square.

    Shape:
        (..., V), (..., V) -> (...).

    Raises:
        ValueError: If the shapes differ, or there are fewer than two classes to rank.

    >>> x = torch.randn(3, 5)
    >>> bool(pairwise_ranking_divergence(x + 2, x).max() < 1e-6)
    True
    """
    require_same_shape(student_logits, teacher_logits)
    ranked = student_logits.shape[-1] if top_k is None else min(top_k, student_logits.shape[-1])
    if ranked < 2:
        raise ValueError(f"Ranking needs at least two classes, got top_k={top_k} of {student_logits.shape[-1]}.")
    ours, theirs = at_least_fp32(student_logits), at_least_fp32(teacher_logits)
    theirs, best = theirs.topk(ranked, dim=-1)
    ours = ours.gather(-1, best)
    least = torch.finfo(ours.dtype).min / 4  # a class may be masked by -inf: two of them have no margin
    ours, theirs = ours.clamp(min=least), theirs.clamp(min=least)
    above, below = torch.triu_indices(ranked, ranked, offset=1, device=ours.device)
    ours, theirs = (binary_logits(logits[..., above] - logits[..., below]) for logits in (ours, theirs))
    return kl_divergence(ours, theirs, temperature).mean(-1)
