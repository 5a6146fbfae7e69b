"""A distribution of which only the likeliest classes are known by themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.functional import grouped_log_probabilities


@dataclass(frozen=True)
class TopKLogits:
    """Log-probabilities of k + 1 outcomes: the k likeliest classes, and any other one.

    A student is compared on the same k + 1 outcomes. With `p` the teacher's and `q` the student's probabilities, both
    at temperature 1, the gradient of the forward KL is that of all classes, `q[c] - p[c]`, for the k classes. For the
    others it is `q[c] - q[c] * rest(p) / rest(q)`: it moves them all by one factor, until together they have as much
    probability as the teacher gives them. What it lacks, its bias, is what the teacher says about them one by one:
    `p[c] - q[c] * rest(p) / rest(q)`. A temperature softens the k + 1 outcomes. With k = V nothing is lost.

    Attributes:
        log_probabilities: (..., k + 1), the last of all other classes together.
        classes: (..., k), their indices.
        vocabulary: V, how many classes there are.

    >>> TopKLogits.of(torch.tensor([[0.1, 0.6, 0.3]]).log(), k=1).log_probabilities.exp()
    tensor([[0.6000, 0.4000]])
    """

    log_probabilities: Tensor
    classes: Tensor
    vocabulary: int

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopKLogits:
        """What is left of logits. Shape: (..., V)."""
        classes = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
        return cls(grouped_log_probabilities(logits, classes), classes, logits.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits: (..., V)."""
        return torch.Size((*self.classes.shape[:-1], self.vocabulary))

    def __getitem__(self, positions: Any) -> TopKLogits:
        """Those at some positions; classes cannot be selected this way."""
        return replace(self, log_probabilities=self.log_probabilities[positions], classes=self.classes[positions])

    def first_classes(self, count: int) -> TopKLogits:
        """Without the last classes, such as the padding of a vocabulary, which have next to no probability.

        Raises:
            ValueError: If one of them is among the likeliest.
        """
        if self.classes.numel() and int(self.classes.max()) >= count:
            raise ValueError(
                f"Among the teacher's likeliest classes is {int(self.classes.max())}, but the student has only "
                f'{count}. Keep the teacher\'s answers with teacher_cache_logits="hidden_state".'
            )
        return replace(self, vocabulary=count)

    def beside(self, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities of the k + 1 outcomes. Shape: (..., V) -> (..., k + 1) each."""
        return grouped_log_probabilities(student_logits, self.classes), self.log_probabilities
