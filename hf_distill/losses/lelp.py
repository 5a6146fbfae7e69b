"""Learning where within its class the teacher sees a row (LELP)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Needs, Shapes
from hf_distill.batch import Batch
from hf_distill.functional import at_least_fp32, kl_divergence
from hf_distill.losses.base import DistillationLoss
from hf_distill.losses.layers import vectors, width
from hf_distill.losses.pooled import FINAL, POOLINGS
from hf_distill.losses.response import NO_CLASSES, NO_MEAN_OVER_SPANS, set_temperature
from hf_distill.mapping import LayerMapping, layers_of
from hf_distill.schedules import Schedule
from hf_distill.unprojected import materialised

_NO_VOCABULARY = "it splits every class, and the classes of a language model are its vocabulary. Use SoftTargetLoss"
_UNDEFINED = {**NO_CLASSES, **NO_MEAN_OVER_SPANS, "masked_lm": _NO_VOCABULARY, "causal_lm": _NO_VOCABULARY}
_MOST = 1 << 14  # vectors that are looked at, however many tokens the rows have


class LELPLoss(DistillationLoss):
    """KL(teacher || student) over pseudo-subclasses that are read off the teacher's embeddings, times temperature².

    With few classes the logits carry little beside the label. LELP (Loo et al., 2024, "Linear Projections of Teacher
    Embeddings for Few-Class Distillation") splits each class into S pseudo-subclasses by linear projections of the
    teacher's final hidden state: the principal directions of the class' embeddings, without what the logits tell
    already, rotated at random so that all carry alike. They are found before the first step ([`fit`]), from the rows
    that the teacher counts to the class, and need no labels.

    The compared distributions are `P(class, subclass) = softmax(logits / T) · softmax(projections within the class)`.
    The teacher's projections are standardised within the class and divided by `subclass_temperature`; the student's
    are one learned linear map of its own final hidden state, which stays in this loss. So the student keeps its
    classes, whose probabilities are the sums over their subclasses, and by the chain rule the value is the soft-target
    loss plus the KL within the classes, weighted by the teacher's probabilities. The paper gives the student S outputs
    for each class and adds them up afterwards; it projects onto the null space of the output layer's weights, where
    here a least-squares fit of the logits on the embeddings stands, which is the same for a linear output layer; the
    standardisation is ours.

    It takes the place of [`SoftTargetLoss`]. For single-label classification of rows or tokens.

    Args:
        subclasses: S, at least 2 and at most the teacher's width.
        temperature: Divides the logits of both sides; a number or a [`Schedule`].
        subclass_temperature: Divides the teacher's standardised projections; the lower, the harder the subclasses.
        pooling: What stands for a row: its `"first"` real token or the `"mean"` of them. Not read in token tasks.
        outside_logits: Whether directions that the logits tell already are left out.
        fit_rows: How many training rows the directions are found in.
        seed: Of the random rotation.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the models cannot be compared; in `fit`, if there is
            nothing to find directions in.
    """

    student_needs = Needs(logits=True, hidden_states=True)
    teacher_needs = Needs(logits=True, hidden_states=True)
    pools_tokens = True
    undefined_for = _UNDEFINED
    fit_rows = 2048
    temperature: float
    directions: Tensor
    offsets: Tensor
    citation = """@article{loo2024linear,
  title={Linear Projections of Teacher Embeddings for Few-Class Distillation},
  author={Loo, Noel and Iliopoulos, Fotis and Hu, Wei and Vee, Erik},
  journal={arXiv preprint arXiv:2409.20449},
  year={2024}
}"""

    def __init__(
        self,
        subclasses: int = 4,
        temperature: float | Schedule = 2.0,
        subclass_temperature: float = 1.0,
        pooling: Literal["first", "mean"] = "first",
        weight: float | Schedule = 1.0,
        *,
        outside_logits: bool = True,
        fit_rows: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        set_temperature(self, temperature)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}.")
        if subclasses < 2 or fit_rows < 2 or subclass_temperature <= 0:
            raise ValueError(
                "subclasses and fit_rows must be at least 2 and subclass_temperature above 0, got "
                f"{subclasses}, {fit_rows} and {subclass_temperature}."
            )
        self.subclasses, self.subclass_temperature, self.pooling = subclasses, subclass_temperature, pooling
        self.outside_logits, self.fit_rows, self.seed = outside_logits, fit_rows, seed

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ours, theirs = student_shapes.hidden_states, teacher_shapes.hidden_states
        ((s, t),) = LayerMapping.parse(FINAL).resolve(len(ours) - 1, len(theirs) - 1)
        t = layers_of(t)[0]
        logits: tuple[int, ...] = student_shapes.logits or ()
        if len(logits) == 2 and logits[0] != ours[s][0]:
            raise ValueError(
                f"LELPLoss needs one hidden state a row, but {logits[0]} rows have {ours[s][0]} sequences (multiple "
                "choice). Use SoftTargetLoss."
            )
        if self.pooling == "first" and len(logits) == 2 and 4 in (len(ours[s]), len(theirs[t])):
            raise ValueError("A final hidden state is a feature map, which has no first token. Use pooling='mean'.")
        if self.subclasses > width(theirs[t]):
            raise ValueError(
                f"{self.subclasses} subclasses need as many directions; the teacher has {width(theirs[t])}."
            )
        classes = logits[-1]
        self.student_needs = Needs(logits=True, hidden_states=(s,))
        self.teacher_needs = Needs(logits=True, hidden_states=(t,))
        self.head = nn.Linear(width(ours[s]), classes * self.subclasses)
        self.register_buffer("directions", torch.zeros(classes, self.subclasses, width(theirs[t])))
        self.register_buffer("offsets", torch.zeros(classes, self.subclasses))

    def fit(self, batches: Iterable[tuple[Activations, Activations, Batch]]) -> None:
        logits, embeddings, found = [], [], 0
        for _, teacher, batch in batches:
            some_logits, some = self._read(teacher, self.teacher_needs, batch.of_teacher(), batch)
            logits.append(some_logits.double().cpu())
            embeddings.append(some.double().cpu())
            found += len(some)
            if found >= _MOST:
                break
        if found < 2:
            raise ValueError(
                f"LELPLoss finds its directions in at least two positions, the training data has {found}."
            )
        directions, offsets = subclass_directions(
            torch.cat(embeddings), torch.cat(logits), self.subclasses, self.outside_logits, self.seed
        )
        self.directions.copy_(directions)
        self.offsets.copy_(offsets)

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        our_logits, ours = self._read(student, self.student_needs, batch, batch)
        their_logits, theirs = self._read(teacher, self.teacher_needs, batch.of_teacher(), batch)
        within = self.head(ours.to(self.head.weight.dtype)).unflatten(-1, (-1, self.subclasses))
        projected = torch.einsum("nh,csh->ncs", theirs.to(self.directions.dtype), self.directions) - self.offsets
        values = kl_divergence(
            self._joint(our_logits, within), self._joint(their_logits, projected / self.subclass_temperature)
        )
        return batch.mean(self.temperature**2 * values)

    def _joint(self, logits: Tensor, within: Tensor) -> Tensor:
        """The logarithm of P(class, subclass). Shape: (N, C), (N, C, S) -> (N, C S)."""
        classes = (at_least_fp32(logits) / self.temperature).log_softmax(-1)
        return (classes[..., None] + at_least_fp32(within).log_softmax(-1)).flatten(1)

    def _read(self, activations: Activations, needs: Needs, own: Batch, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and embeddings at the positions that are compared, with the masks of the model's `own` tokens."""
        logits = materialised(activations.logits)  # type: ignore[arg-type]
        state = vectors(activations.hidden_states[needs.hidden_states[0]])  # type: ignore[index]
        if logits.ndim == 3:
            return batch.select(logits), batch.select(state)
        tokens = own.masks.get("tokens")
        kept = own.masks["rows"] if tokens is None else tokens.any(-1)  # a row without a real token has no embedding
        return logits[kept], own.first_token(state) if self.pooling == "first" else own.mean_of_tokens(state)

    def formula(self) -> str:
        return f"LELP, {self.subclasses} subclasses, T={self.shown('temperature')}"


def subclass_directions(
    embeddings: Tensor, logits: Tensor, subclasses: int, outside_logits: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The projections that split each class: `directions · embedding - offsets`.

    Within the class they have mean 0 and, averaged over the subclasses, variance 1. A class with fewer than two rows
    is not split (zeros), and one with fewer directions than subclasses is split along those it has.

    Args:
        embeddings: The teacher's, in float64.
        logits: The teacher's, which say what class a row is of.
        subclasses: How many directions a class gets.
        outside_logits: Whether to leave out directions that the logits tell already.
        seed: Of the rotation.

    Shape:
        (N, H), (N, C) -> (C, S, H), (C, S).
    """
    kept = torch.eye(embeddings.shape[1], dtype=embeddings.dtype)
    if outside_logits:
        told = _told_by_logits(embeddings, logits)
        kept = kept - told @ told.T
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(subclasses, subclasses, generator=generator, dtype=embeddings.dtype))
    rotation = q * r.diagonal().sign()  # uniform over all rotations
    directions = embeddings.new_zeros(logits.shape[1], subclasses, embeddings.shape[1])
    offsets = embeddings.new_zeros(logits.shape[1], subclasses)
    answers = logits.argmax(-1)
    for index in answers.unique().tolist():
        rows = embeddings[answers == index]
        centre = rows.mean(0)
        principal = _principal_directions((rows - centre) @ kept, subclasses)
        found = rotation @ principal
        scale = ((rows - centre) @ found.T).square().mean().sqrt()
        if scale > 0:
            directions[index] = found / scale
            offsets[index] = directions[index] @ centre
    return directions, offsets


def _told_by_logits(embeddings: Tensor, logits: Tensor) -> Tensor:
    """An orthonormal basis of directions that a least-squares fit of the logits reads. Shape: (H, C - 1 or fewer)."""
    relative = logits - logits.mean(-1, keepdim=True)  # a constant added to all logits says nothing
    fit = torch.linalg.lstsq(embeddings - embeddings.mean(0), relative - relative.mean(0), driver="gelsd").solution
    basis, strength, _ = torch.linalg.svd(fit, full_matrices=False)
    real = strength > 1e-6 * strength.max().clamp(min=torch.finfo(fit.dtype).tiny)
    return basis[:, real][:, : logits.shape[1] - 1]


def _principal_directions(centred: Tensor, count: int) -> Tensor:
    """Unit vectors of largest variance, zeros where there is none left; each with its largest entry positive.

    Shape:
        (N, H) -> (count, H).
    """
    variances, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
    found = basis.T.flip(0)[:count]
    found = found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    real = variances.flip(0)[:count] > 1e-9 * variances[-1].clamp(min=torch.finfo(variances.dtype).tiny)
    return found * real[:, None]
