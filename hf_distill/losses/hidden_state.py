"""Learning from what the teacher thinks on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Needs, Shapes
from hf_distill.batch import Batch, Over
from hf_distill.functional import cosine_distance, mean_squared_error, normalized_mean_squared_error
from hf_distill.losses.base import DistillationLoss
from hf_distill.losses.layers import (
    Pairs,
    averaged,
    require_one_shape,
    student_layers,
    teacher_layers,
    vectors,
    width,
)
from hf_distill.mapping import LayerMapping, Teachers, layers_of
from hf_distill.projection import Projection
from hf_distill.schedules import Schedule

Distance = Literal["mse", "normalized_mse", "cosine"]
DISTANCES = {
    "mse": mean_squared_error,
    "normalized_mse": normalized_mean_squared_error,
    "cosine": cosine_distance,
}
HIDDEN_STATE_POSITIONS = ("all", "first")


class HiddenStateLoss(DistillationLoss):
    """Distance between mapped hidden states at every real token, averaged over tokens and over the mapped layers.

    Index 0 is the embedding output, index `k` the output of block `k`: `HiddenStateLoss({0: 0, 1: 2, 2: 4})` compares
    the embeddings of both models too. Where several teacher layers are mapped on one student layer, their average is
    the target: `HiddenStateLoss({1: (1, 2), 2: (3, 4)})`.

    Where the widths differ, one linear projection for each student layer is learned with the student; it lives in this
    loss and never in the student's weights (FitNets, Romero et al., 2015; TinyBERT, Jiao et al., 2020, equation 8).

    Args:
        layer_mapping: Which layer learns from which: a [`LayerMapping`], `"uniform"`, `"first"`, `"last"`, or
            `{student index: teacher index}` in `hidden_states` indices.
        distance: `"mse"` (mean over the width), `"normalized_mse"` (of unit vectors, insensitive to scale),
            `"cosine"`.
        positions: `"all"` compares every real token, `"first"` only the first real token of each sequence, whose
            state encoders classify by (PKD, Sun et al., 2019, equation 7, with `distance="normalized_mse"`); the mean
            is then over rows.
        weight: Factor of this term.

    Raises:
        ValueError: If mapping, distance or positions are unknown; in `setup`, if the layers cannot be compared.
    """

    student_needs = Needs(hidden_states=True)
    teacher_needs = Needs(hidden_states=True)
    over: Over = "tokens"
    citation = """@inproceedings{jiao2020tinybert,
  title={TinyBERT: Distilling BERT for Natural Language Understanding},
  author={Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang \
and Liu, Qun},
  booktitle={Findings of EMNLP},
  year={2020}
}"""

    def __init__(
        self,
        layer_mapping: LayerMapping | Mapping[int, int | Sequence[int]] | str = "uniform",
        distance: Distance = "mse",
        weight: float | Schedule = 1.0,
        *,
        positions: Literal["all", "first"] = "all",
    ) -> None:
        super().__init__(weight)
        if positions not in HIDDEN_STATE_POSITIONS:
            raise ValueError(f"positions must be one of {HIDDEN_STATE_POSITIONS}, got {positions!r}.")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {tuple(DISTANCES)}, got {distance!r}.")
        self.layer_mapping = LayerMapping.parse(layer_mapping)
        self.distance, self.positions = distance, positions
        self.over = "tokens" if positions == "all" else "rows"
        self.pairs: Pairs = ()
        self.projections = nn.ModuleDict()

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ours, theirs = student_shapes.hidden_states, teacher_shapes.hidden_states
        self.pairs = self.layer_mapping.resolve(len(ours) - 1, len(theirs) - 1)
        for s, t in self.pairs:
            require_one_shape(t, dict(enumerate(theirs)))
            for index in layers_of(t) if self.positions == "all" else ():
                _require_same_positions(s, ours[s], index, theirs[index])
            if self.positions == "first" and len(ours[s]) == 4:
                raise ValueError(
                    f"Hidden state {s} of the student is a feature map {ours[s]}, which has no first token. Use "
                    "positions='all'."
                )
        self.projections = nn.ModuleDict(
            {str(s): Projection(width(ours[s]), width(theirs[layers_of(t)[0]])) for s, t in self.pairs}
        )
        self.student_needs = Needs(hidden_states=student_layers(self.pairs))
        self.teacher_needs = Needs(hidden_states=teacher_layers(self.pairs))

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        return torch.stack([self._compare(s, t, student, teacher, batch) for s, t in self.pairs]).mean()

    def _compare(self, s: int, t: Teachers, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        ours = self._select(student.hidden_states[s], batch)  # (N, H_student)
        theirs = averaged(teacher.hidden_states, t, lambda x: self._select(x, batch))  # (N, H_teacher)
        values = DISTANCES[self.distance](self.projections[str(s)](ours), theirs)
        if self.positions == "first":
            return batch.mean_of_texts(values)
        return batch.mean(values, "tokens")

    def _select(self, x: Tensor, batch: Batch) -> Tensor:
        return batch.first_token(x) if self.positions == "first" else batch.select(vectors(x), "tokens")

    def formula(self) -> str:
        layers = dict(self.pairs) if self.pairs else self.layer_mapping
        where = " of first tokens" if self.positions == "first" else ""
        return f"{self.distance}{where}, student layer: teacher layer = {layers}"


def _require_same_positions(s: int, ours: tuple[int, ...], t: int, theirs: tuple[int, ...]) -> None:
    positions = [shape[2:] if len(shape) == 4 else shape[1:-1] for shape in (ours, theirs)]
    if positions[0] != positions[1]:
        raise ValueError(
            f"Hidden state {s} of the student has positions {positions[0]}, hidden state {t} of the teacher "
            f"{positions[1]}: they do not describe the same tokens or patches. Map layers of equal resolution with an "
            "explicit layer mapping, or drop the hidden-state loss."
        )
