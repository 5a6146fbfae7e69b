"""What the trainer expects of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

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
