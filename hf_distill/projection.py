"""The learned map between two widths."""

from __future__ import annotations

from torch import Tensor, nn


class Projection(nn.Module):
    """The identity where the widths agree, else one learned linear map without bias (TinyBERT, Jiao et al., 2020,
    equation 8).

    Shape:
        (..., H_student) -> (..., H_teacher).
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        same = student_width == teacher_width
        self.linear = None if same else nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # A bf16 student meets an fp32 projection: the projection decides.
        return x if self.linear is None else self.linear(x.to(self.linear.weight.dtype))
