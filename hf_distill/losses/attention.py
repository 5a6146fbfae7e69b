"""Learning where the teacher looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_distill.activations import Activations, Needs, Shapes
from hf_distill.batch import Batch
from hf_distill.functional import at_least_fp32, attention_kl_divergence
from hf_distill.losses.base import DistillationLoss
from hf_distill.losses.layers import Pairs, averaged, require_one_shape, student_layers, teacher_layers
from hf_distill.mapping import LayerMapping, layers_of
from hf_distill.schedules import Schedule

ATTENTION_DISTANCES = ("mse", "kl")


class AttentionLoss(DistillationLoss):
    """Distance between mapped attention maps, averaged over the real query tokens, heads and mapped layers.

    The maps are probabilities, after the softmax. Where the numbers of heads differ, both are averaged over heads
    first; where several teacher layers are mapped on one student layer, their maps are. Asking for maps makes both
    models run eager attention.

    Args:
        layer_mapping: As in [`HiddenStateLoss`]; index `k` is the map of the block whose output is hidden state `k`.
        distance: `"mse"`, the squared error over the real keys of a query (TinyBERT, Jiao et al., 2020, equation 7,
            there on the scores before the softmax), or `"kl"`, KL(teacher || student) of its distribution over keys
            (MiniLM, Wang et al., 2020, equation 2). A student with attention dropout returns maps that are no
            distributions while it trains, so `"kl"` is refused for it.
        weight: Factor of this term.

    Raises:
        ValueError: If the mapping or the distance is unknown; in `setup`, if the layers cannot be compared.
    """

    student_needs = Needs(attentions=True)
    teacher_needs = Needs(attentions=True)
    over = "tokens"
    citation = """@inproceedings{wang2020minilm,
  title={MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author={Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle={NeurIPS},
  year={2020}
}"""

    def __init__(
        self,
        layer_mapping: LayerMapping | Mapping[int, int | Sequence[int]] | str = "uniform",
        distance: Literal["mse", "kl"] = "mse",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        if distance not in ATTENTION_DISTANCES:
            raise ValueError(f"distance must be one of {ATTENTION_DISTANCES}, got {distance!r}.")
        self.layer_mapping = LayerMapping.parse(layer_mapping)
        self.distance = distance
        self.needs_distributions = distance == "kl"
        self.pairs: Pairs = ()

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ours, theirs = student_shapes.attentions, teacher_shapes.attentions
        self.pairs = self.layer_mapping.resolve(len(ours), len(theirs))
        for s, t in self.pairs:
            for index in layers_of(t):
                _require_same_tokens(s, ours, index, theirs)
            require_one_shape(t, dict(enumerate(theirs, 1)))
        self.student_needs = Needs(attentions=student_layers(self.pairs))
        self.teacher_needs = Needs(attentions=teacher_layers(self.pairs))

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        pairs = [(student.attentions[s], averaged(teacher.attentions, t, lambda x: x)) for s, t in self.pairs]
        return torch.stack([self._compare(ours, theirs, batch) for ours, theirs in pairs]).mean()

    def _compare(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        if ours.shape[1] != theirs.shape[1]:
            ours, theirs = at_least_fp32(ours).mean(1, keepdim=True), at_least_fp32(theirs).mean(1, keepdim=True)
        ours = at_least_fp32(batch.select(ours.transpose(1, 2), "tokens"))  # (N, A, T): one row of keys a query
        theirs = at_least_fp32(batch.select(theirs.transpose(1, 2), "tokens"))
        if self.distance == "kl":
            return batch.mean(attention_kl_divergence(ours, theirs).mean(-1), "tokens")
        # Padded keys have no weight in either map: only the divisor must not count them.
        return batch.mean((ours - theirs).square().sum(-1).mean(-1) / batch.tokens_of_row(ours.shape[-1]), "tokens")

    def formula(self) -> str:
        layers = dict(self.pairs) if self.pairs else self.layer_mapping
        return f"{self.distance} of attention maps, student layer: teacher layer = {layers}"


def _require_same_tokens(
    s: int, ours: tuple[tuple[int, ...], ...], t: int, theirs: tuple[tuple[int, ...], ...]
) -> None:
    if 0 in (s, t):
        raise ValueError(f"The embedding output has no attention map, but layer_mapping pairs {s} with {t}.")
    if ours[s - 1][2:] != theirs[t - 1][2:]:
        raise ValueError(
            f"The attention map of student layer {s} is {ours[s - 1][2:]} tokens, that of teacher layer {t} "
            f"{theirs[t - 1][2:]}: they do not describe the same tokens. Drop the attention loss."
        )
