"""What the trainer expects of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from hf_distill.activations import Activations, Needs


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers for a batch.

    Attributes:
        config: A Transformers config: label names, vocabulary and lengths are compared with the student's. May be
            `None`.
        name: What the model card and the checkpoints call it; never the weights.
        input_names: The forward arguments that it reads, so that their columns are kept.
    """

    config: Any
    name: str
    input_names: set[str]

    def __call__(self, inputs: Mapping[str, Any], needs: Needs) -> Activations:
        """What is needed for one batch, on the batch's device, without gradients; logits as in [`Head.answers`]."""
        ...


@runtime_checkable
class LocalTeacher(Teacher, Protocol):
    """A teacher whose model is here: asked in any precision, and moved out of the way between questions."""

    def answer(self, inputs: Mapping[str, Any], needs: Needs, dtype: torch.dtype | None = None) -> Activations:
        """As a call, computed in `dtype`."""
        ...

    def release(self) -> None:
        """Make room on the accelerator until the next question."""
        ...

    def use_eager_attention(self) -> None:
        """Make the model return its attention maps."""
        ...
