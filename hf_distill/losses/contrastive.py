"""Learning to be told apart as the teacher tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from hf_distill.activations import Shapes
from hf_distill.losses.layers import width
from hf_distill.losses.pooled import FINAL, PooledLoss
from hf_distill.losses.response import set_temperature
from hf_distill.mapping import LayerMapping, layers_of
from hf_distill.projection import Projection
from hf_distill.schedules import Schedule
from hf_distill.similarity import info_nce


class ContrastiveLoss(PooledLoss):
    """Cross-entropy of finding each row's own teacher vector among those of the micro-batch, in nats; at least 0.

    InfoNCE between pooled hidden states as in CoDIR (Sun et al., 2020), after the idea of CRD (Tian et al., 2020), but
    with the other rows of the micro-batch as negatives instead of a memory bank: it needs batches of many rows, and
    equal rows in a batch count as different. Where the widths differ, one linear projection for each student layer is
    learned with the student; the teacher's side is not projected.

    Args:
        layer_mapping: Which hidden states are compared, as in [`HiddenStateLoss`]; the final ones by default.
        pooling: What stands for a row: `"mean"` of its real tokens (as in CoDIR), or the `"first"`.
        temperature: Divides the cosines; above 0, a number or a [`Schedule`].
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the layers cannot be compared.
    """

    temperature: float
    citation = """@inproceedings{sun2020contrastive,
  title={Contrastive Distillation on Intermediate Representations for Language Model Compression},
  author={Sun, Siqi and Gan, Zhe and Fang, Yuwei and Cheng, Yu and Wang, Shuohang and Liu, Jingjing},
  booktitle={EMNLP},
  year={2020}
}"""

    def __init__(
        self,
        layer_mapping: LayerMapping | Mapping[int, Any] | str = FINAL,
        pooling: Literal["mean", "first"] = "mean",
        weight: float | Schedule = 1.0,
        *,
        temperature: float | Schedule = 0.1,
    ) -> None:
        super().__init__(layer_mapping, pooling, weight)
        set_temperature(self, temperature)
        self.projections = nn.ModuleDict()

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().setup(student_shapes, teacher_shapes)
        ours, theirs = student_shapes.hidden_states, teacher_shapes.hidden_states
        self.projections = nn.ModuleDict(
            {str(s): Projection(width(ours[s]), width(theirs[layers_of(t)[0]])) for s, t in self.pairs}
        )

    def project(self, rows: Tensor, layer: int) -> Tensor:
        return self.projections[str(layer)](rows)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return info_nce(student, teacher, self.temperature).mean()

    def formula(self) -> str:
        return self.named(f"InfoNCE (T={self.shown('temperature')})")
