"""How far two vectors lie apart, position by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.functional.precision import at_least_fp32, require_same_shape


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error averaged over the last dimension (FitNets, Romero et al., 2015, equation 3, per element).

    Shape:
        (..., H), (..., H) -> (...).

    Raises:
        ValueError: If the shapes differ; nothing is broadcast.

    >>> mean_squared_error(torch.zeros(2, 4), torch.ones(2, 4))
    tensor([1., 1.])
    """
    require_same_shape(student, teacher)
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
    require_same_shape(student, teacher)
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
    require_same_shape(student, teacher)
    return 1.0 - F.cosine_similarity(at_least_fp32(student), at_least_fp32(teacher), dim=-1)


def standardize(x: Tensor) -> Tensor:
    """Z-scores over the last dimension: mean 0 and (population) standard deviation 1.

    On logits it is the logit standardisation of Sun et al., 2024, "Logit Standardization in Knowledge Distillation",
    algorithm 1, whose base temperature is the temperature of the divergence that follows. A vector that does not vary
    has z-scores of 0 and no gradient.

    Shape:
        (..., V) -> (..., V); V at least 1.

    >>> standardize(torch.tensor([[1.0, 3.0, 1.0, 3.0]]))
    tensor([[-1.,  1., -1.,  1.]])
    """
    x = at_least_fp32(x)
    centred = x - x.mean(-1, keepdim=True)
    with torch.no_grad():  # dividing by the largest changes no z-score: it only keeps squares of tiny values from 0
        largest = centred.abs().amax(-1, keepdim=True)
        constant = largest <= 8 * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
    centred = centred.masked_fill(constant, 0.0) / largest.masked_fill(constant, 1.0)
    return centred / centred.square().mean(-1, keepdim=True).masked_fill(constant, 1.0).sqrt()


def pearson_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus Pearson's correlation over the last dimension, in [0, 2]; insensitive to shift and scale.

    Computed as half the mean squared distance of the z-scores, which is the same and stays precise for close vectors.
    Two vectors that do not vary have distance 0, one beside a vector that does 1/2: no correlation is defined there.

    Shape:
        (..., V), (..., V) -> (...).

    Raises:
        ValueError: If the shapes differ.

    >>> x = torch.randn(3, 8)
    >>> bool(pearson_distance(5 * x + 2, x).max() < 1e-6)
    True
    """
    require_same_shape(student, teacher)
    return mean_squared_error(standardize(student), standardize(teacher)) / 2
