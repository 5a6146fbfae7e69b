"""The maths of relations: how alike the geometry of the same N rows is in two representations.

Pure functions of two matrices, (N, H_student), (N, H_teacher) -> (). The widths may differ, since only relations
between rows are compared. Everything is computed in fp32 (float64 stays).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.functional import at_least_fp32


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear centred kernel alignment, in [0, 1]: 1 where one is a rotated and scaled copy of the other.

    `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` with the Gram matrices K and L of the centred rows (Kornblith et al.,
    2019, "Similarity of Neural Network Representations Revisited", equations 3 and 4). With few rows and large widths
    it is biased towards 1: 16 rows of noise of width 768 agree to 0.98. 0 where all rows of one side
    are equal.

    Shape:
        (N, H_student), (N, H_teacher) -> ().

    >>> x = torch.randn(8, 3)
    >>> round(linear_cka(x, -5 * x + 1).item(), 4)
    1.0
    """
    _require_same_rows(student, teacher)
    x, y = (_centred(side) for side in _one_precision(student, teacher))
    scale = (_hsic(x, x) * _hsic(y, y)).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return _hsic(x, y) / scale


def _centred(x: Tensor) -> Tensor:
    """Rows around their mean, scaled to norm 1 as a whole: fourth powers of large states would overflow."""
    return F.normalize((x - x.mean(0)).flatten(), dim=0).view_as(x)


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """tr(x xᵀ y yᵀ) of centred rows, up to the factor (N - 1)², by way of the smaller matrices."""
    if len(x) <= min(x.shape[1], y.shape[1]):
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


def debiased_cka(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Linear CKA of several representations with several others, without the bias of few rows; at most 1.

    By the unbiased estimator of HSIC (Song et al., 2012, "Feature Selection via Dependence Maximization", equation 5;
    for CKA: Nguyen et al., 2021, "Do Wide and Deep Networks Learn the Same Things?", equation 3). Unrelated
    representations are near 0, on either side of it.

    Shape:
        S times (N, H), T times (N, H) -> (S, T).

    Raises:
        ValueError: If there are fewer than four rows, or unequal numbers of them.

    >>> x = torch.randn(8, 3)
    >>> debiased_cka([x], [-5 * x + 1]).shape
    torch.Size([1, 1])
    """
    rows = {len(x) for x in (*students, *teachers)}
    if len(rows) != 1 or min(rows) < 4:
        raise ValueError(f"Debiased CKA needs the same rows everywhere, at least four, got {sorted(rows)}.")
    ours, theirs = (torch.stack([_doubly_centred(at_least_fp32(x)) for x in side]) for side in (students, teachers))
    return ours @ theirs.T


def _doubly_centred(x: Tensor) -> Tensor:
    """The Gram matrix without its diagonal, centred so that products of two are unbiased, scaled to norm 1.

    Shape:
        (N, H) -> (N²,).
    """
    x, n = _centred(x), len(x)
    gram = (x @ x.T).fill_diagonal_(0)
    rows, total = gram.sum(0) / (n - 2), gram.sum() / ((n - 1) * (n - 2))
    return F.normalize((gram - rows[:, None] - rows[None, :] + total).fill_diagonal_(0).flatten(), dim=0)


def similarity_preserving_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between the rows' similarities, each row of them scaled to unit length; in [0, 4 / N].

    `1 / N² ‖G_T - G_S‖²` where G is the row-normalised `A Aᵀ` (Tung and Mori, 2019, "Similarity-Preserving Knowledge
    Distillation", section 3).

    Shape:
        (N, H_student), (N, H_teacher) -> ().

    >>> x = torch.randn(8, 3)
    >>> similarity_preserving_distance(x, 3 * x).item() < 1e-6
    True
    """
    _require_same_rows(student, teacher)
    ours, theirs = (F.normalize(side @ side.T, dim=1) for side in _one_precision(student, teacher))
    return (ours - theirs).square().mean()


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance (with threshold 1) between the rows' pairwise distances, each side divided by its mean distance.

    Averaged over the pairs of different rows (RKD-D, Park et al., 2019, "Relational Knowledge Distillation",
    section 3.2.1). At least 0; 0 for fewer than two rows.

    Shape:
        (N, H_student), (N, H_teacher) -> ().

    >>> x = torch.randn(8, 3)
    >>> relational_distance(x, 3 * x + 1).item() < 1e-6
    True
    """
    _require_same_rows(student, teacher)
    ours, theirs = (_relative_distances(side) for side in _one_precision(student, teacher))
    return F.huber_loss(ours, theirs, reduction="sum") / max(len(ours), 1)


def _relative_distances(x: Tensor) -> Tensor:
    """Distances of the pairs of different rows, their mean scaled to 1. Shape: (N, H) -> (N (N - 1),)."""
    # Without the shortcut by matrix products, which cancels for close rows; its gradient at distance 0 is 0.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = distances[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    return pairs / pairs.sum().div(max(len(pairs), 1)).clamp(min=torch.finfo(x.dtype).eps)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance (with threshold 1) between the cosines of the angles that triplets of rows span.

    The cosine at row j between rows i and k, averaged over the triplets of different rows (RKD-A, Park et al., 2019,
    section 3.2.2). Lies in [0, 1.5]; 0 for fewer than three rows. Takes N³ numbers of memory on each side.

    Shape:
        (N, H_student), (N, H_teacher) -> ().

    >>> x = torch.randn(8, 3)
    >>> relational_angle(x, 3 * x + 1).item() < 1e-6
    True
    """
    _require_same_rows(student, teacher)
    ours, theirs = (_angles(side) for side in _one_precision(student, teacher))
    n = len(student)
    return F.huber_loss(ours, theirs, reduction="sum") / max(n * (n - 1) * (n - 2), 1)


def _angles(x: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k. Shape: (N, H) -> (N, N, N), in the order j, i, k."""
    apart = x[None, :] - x[:, None]  # (N, N, H)
    squared = apart.square().sum(-1, keepdim=True)
    # Rows that are the same, up to rounding, lie in no direction: without this their gradient would be 1e10.
    same = squared <= (8 * torch.finfo(x.dtype).eps) ** 2 * x.square().sum(-1).amax() if len(x) else squared > 0
    directions = apart.masked_fill(same, 0) / squared.masked_fill(same, 1).sqrt()
    cosines = directions @ directions.transpose(1, 2)
    equal = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return cosines.masked_fill(equal[None] | equal[:, None] | equal[:, :, None], 0)


def info_nce(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of finding a row's own teacher vector among those of all rows, by cosine, in nats, for each row.

    `-log(exp(cos(s_i, t_i) / τ) / Σ_j exp(cos(s_i, t_j) / τ))` (van den Oord et al., 2018, "Representation Learning
    with Contrastive Predictive Coding", equation 4, between student and teacher as in CoDIR, Sun et al., 2020). At
    least 0; near log N where nothing is learned. 0 for one row.

    Shape:
        (N, H), (N, H) -> (N,).

    Raises:
        ValueError: If the shapes differ.

    >>> x = torch.eye(4)
    >>> round(info_nce(x, x, temperature=1.0)[0].item(), 4)  # log(e + 3) - 1
    0.7437
    """
    if student.shape != teacher.shape:
        raise ValueError(f"Student and teacher need one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    ours, theirs = (F.normalize(side, dim=-1) for side in _one_precision(student, teacher))
    own = torch.arange(len(ours), device=ours.device)
    return F.cross_entropy(ours @ theirs.T / temperature, own, reduction="none")


def _one_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    ours, theirs = at_least_fp32(student), at_least_fp32(teacher)
    dtype = torch.promote_types(ours.dtype, theirs.dtype)  # products of matrices do not promote by themselves
    return ours.to(dtype), theirs.to(dtype)


def _require_same_rows(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"Relations are compared between the same rows, as (N, H) each, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
