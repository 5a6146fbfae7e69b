"""What losses on the relations between rows have in common: one vector a row, and a share of the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_distill.activations import Activations, Needs, Shapes
from hf_distill.batch import Batch, Over
from hf_distill.losses.base import DistillationLoss
from hf_distill.losses.layers import Pairs, averaged, require_one_shape, student_layers, teacher_layers, vectors
from hf_distill.mapping import LayerMapping
from hf_distill.schedules import Schedule

POOLINGS = ("mean", "first")
FINAL = {-1: -1}


class PooledLoss(DistillationLoss):
    """Base of the losses that compare relations between the rows of a micro-batch; derive and define `compare`.

    Each row is one vector: the mean of its real tokens (or patches), or its first real token. The term is computed in
    every micro-batch and process by itself and averaged with their shares of the rows, so it depends on how the window
    is split: relations across micro-batches are not seen. A micro-batch of a single row adds 0.

    Args:
        layer_mapping: Which hidden states are compared, as in [`HiddenStateLoss`]; the final ones by default.
        pooling: `"mean"` or `"first"`.
        weight: Factor of this term.

    Attributes:
        called: What it is called in the printed equation.

    Raises:
        ValueError: If an argument is unknown; in `setup`, if the layers cannot be compared.
    """

    student_needs = Needs(hidden_states=True)
    teacher_needs = Needs(hidden_states=True)
    over: Over = "rows"
    couples_rows = True
    pools_tokens = True
    called: str = ""

    def __init__(
        self,
        layer_mapping: LayerMapping | Mapping[int, Any] | str = FINAL,
        pooling: Literal["mean", "first"] = "mean",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}.")
        self.layer_mapping = LayerMapping.parse(layer_mapping)
        self.pooling = pooling
        self.pairs: Pairs = ()

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ours, theirs = student_shapes.hidden_states, teacher_shapes.hidden_states
        self.pairs = self.layer_mapping.resolve(len(ours) - 1, len(theirs) - 1)
        for s, t in self.pairs:
            require_one_shape(t, dict(enumerate(theirs)))
            if self.pooling == "first" and len(ours[s]) == 4:
                raise ValueError(
                    f"Hidden state {s} of the student is a feature map {ours[s]}, which has no first token. Use "
                    "pooling='mean'."
                )
        self.student_needs = Needs(hidden_states=student_layers(self.pairs))
        self.teacher_needs = Needs(hidden_states=teacher_layers(self.pairs))

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        def pool(x: Tensor, own: Batch = batch) -> Tensor:
            return (own.first_token if self.pooling == "first" else own.mean_of_tokens)(vectors(x))

        terms, of_teacher = [], batch.of_teacher()
        for s, t in self.pairs:
            ours = self.project(pool(student.hidden_states[s]), s)
            theirs = averaged(teacher.hidden_states, t, lambda x: pool(x, of_teacher))
            terms.append(self.compare(ours, theirs) if len(ours) > 1 else ours.sum() * 0.0)
        return batch.mean(torch.stack(terms).mean().expand(batch.rows), "rows")

    def project(self, rows: Tensor, layer: int) -> Tensor:
        """The student's rows as they are compared. Shape: (N, H_student) -> (N, H)."""
        return rows

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The term for at least two rows. Shape: (N, H_student), (N, H_teacher) -> ()."""
        raise NotImplementedError(f"{type(self).__name__} must define compare(student, teacher).")

    def formula(self) -> str:
        return self.named(self.called or type(self).__name__)

    def named(self, name: str) -> str:
        """A formula with the layers it is about."""
        pooled = "mean tokens" if self.pooling == "mean" else "first tokens"
        layers = dict(self.pairs) if self.pairs else self.layer_mapping
        return f"{name} of {pooled}, student layer: teacher layer = {layers}"
