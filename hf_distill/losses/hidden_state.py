"""Learning from what the teacher thinks on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Needs, Shapes
from hf_distill.batch import Batch
from hf_distill.functional import cosine_distance, mean_squared_error, normalized_mean_squared_error
from hf_distill.losses.base import DistillationLoss
from hf_distill.mapping import LayerMapping
from hf_distill.projection import Projection
from hf_distill.schedules import Schedule

Distance = Literal["mse", "normalized_mse", "cosine"]
DISTANCES = {
    "mse": mean_squared_error,
    "normalized_mse": normalized_mean_squared_error,
    "cosine": cosine_distance,
}


class HiddenStateLoss(DistillationLoss):
    """Distance between mapped hidden states at every real token, averaged over tokens and over the mapped layers.

    Where the widths differ, one linear projection for each student layer is learned with the student; it lives in this
    loss and never in the student's weights (FitNets, Romero et al., 2015; TinyBERT, Jiao et al., 2020, equation 8).

    Args:
        layer_mapping: Which layer learns from which: a [`LayerMapping`], `"uniform"`, `"last"`, or
            `{student index: teacher index}` in `hidden_states` indices.
        distance: `"mse"` (mean over the width), `"normalized_mse"` (of unit vectors, insensitive to scale),
            `"cosine"`.
        weight: Factor of this term.

    Raises:
        ValueError: If the mapping or the distance is unknown; in `setup`, if the layers cannot be compared.
    """

    student_needs = Needs(hidden_states=True)
    teacher_needs = Needs(hidden_states=True)
    over = "tokens"
    citation = """@inproceedings{jiao2020tinybert,
  title={TinyBERT: Distilling BERT for Natural Language Understanding},
  author={Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang
  and Liu, Qun}, booktitle={Findings of EMNLP},
  year={2020}
}"""

    def __init__(
        self,
        layer_mapping: LayerMapping | Mapping[int, int] | str = "uniform",
        distance: Distance = "mse",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {tuple(DISTANCES)}, got {distance!r}.")
        self.layer_mapping = LayerMapping.parse(layer_mapping)
        self.distance = distance
        self.pairs: tuple[tuple[int, int], ...] = ()
        self.projections = nn.ModuleDict()

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ours, theirs = student_shapes.hidden_states, teacher_shapes.hidden_states
        self.pairs = self.layer_mapping.resolve(len(ours) - 1, len(theirs) - 1)
        for s, t in self.pairs:
            _require_same_positions(s, ours[s], t, theirs[t])
        self.projections = nn.ModuleDict(
            {str(s): Projection(_width(ours[s]), _width(theirs[t])) for s, t in self.pairs}
        )
        self.student_needs = Needs(hidden_states=tuple(sorted(s for s, _ in self.pairs)))
        self.teacher_needs = Needs(hidden_states=tuple(sorted(t for _, t in self.pairs)))

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        return torch.stack([self._compare(s, t, student, teacher, batch) for s, t in self.pairs]).mean()

    def _compare(self, s: int, t: int, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        ours = batch.select(_vectors(student.hidden_states[s]), "tokens")  # (N, H_student)
        theirs = batch.select(_vectors(teacher.hidden_states[t]), "tokens")  # (N, H_teacher)
        return batch.mean(DISTANCES[self.distance](self.projections[str(s)](ours), theirs), "tokens")

    def formula(self) -> str:
        layers = dict(self.pairs) if self.pairs else self.layer_mapping
        return f"{self.distance}, student layer: teacher layer = {layers}"


def _width(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _vectors(x: Tensor) -> Tensor:
    """Feature maps (B, H, height, width) as (B, T, H); sequences stay as they are."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def _require_same_positions(s: int, ours: tuple[int, ...], t: int, theirs: tuple[int, ...]) -> None:
    positions = [shape[2:] if len(shape) == 4 else shape[1:-1] for shape in (ours, theirs)]
    if positions[0] != positions[1]:
        raise ValueError(
            f"Hidden state {s} of the student has positions {positions[0]}, hidden state {t} of the teacher "
            f"{positions[1]}: they do not describe the same tokens or patches. Map layers of equal resolution with an "
            "explicit layer mapping, or drop the hidden-state loss."
        )
