"""Several teachers that answer as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Head, Needs
from hf_distill.alignment import Alignment, agree_on_task, class_order
from hf_distill.heads import has_label_names
from hf_distill.teachers.fingerprint import fingerprint
from hf_distill.teachers.online import OnlineTeacher
from hf_distill.unprojected import materialised

COMBINATIONS = ("logits", "probabilities")


class EnsembleTeacher:
    """Several teachers whose answers are averaged, position by position.

    `combine="logits"` is the weighted mean of the logits, `"probabilities"` the logarithm of the weighted mean of the
    probabilities, whose softmax is that mean (Hinton et al., 2015, section 2: an ensemble's arithmetic or geometric
    mean). Classes are matched by name with the first teacher's, vocabularies cut to the entries that all have. Hidden
    states and attention maps are those of the first teacher.

    Args:
        teachers: Models or [`OnlineTeacher`]s of one task.
        weights: One number of at least 0 for each teacher, for example its accuracy on validation data; equal if
            left out. `"confidence"` weighs each position's answers by `exp(-entropy)` in nats, so that who is sure
            counts for more (after Kwon et al., 2020, "Adaptive Knowledge Distillation Based on Entropy").
        combine: What is averaged.
        device: Where models run; `None` leaves them where they are.
        dtype: As in [`OnlineTeacher`].

    Raises:
        ValueError: If there are fewer than two teachers, they are for different tasks, or weights do not fit.

    >>> from hf_distill.testing import tiny_task
    >>> one, other = tiny_task("single_label").teacher, tiny_task("single_label", seed=1).teacher
    >>> EnsembleTeacher([one, other], weights=[0.84, 0.86]).name
    'BertForSequenceClassification + BertForSequenceClassification'
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module | OnlineTeacher],
        weights: Sequence[float] | Literal["confidence"] | None = None,
        combine: Literal["logits", "probabilities"] = "logits",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(teachers) < 2:
            raise ValueError(f"An ensemble needs at least two teachers, got {len(teachers)}. Pass the one by itself.")
        if combine not in COMBINATIONS:
            raise ValueError(f"combine must be one of {COMBINATIONS}, got {combine!r}.")
        for teacher in teachers:
            if not isinstance(teacher, OnlineTeacher | nn.Module):
                raise ValueError(
                    f"The teachers of an ensemble are models or OnlineTeachers, got {type(teacher).__name__}. Combine "
                    "teachers of your own in a Teacher of your own."
                )
        self.members = [
            teacher if isinstance(teacher, OnlineTeacher) else OnlineTeacher(teacher, device, dtype=dtype)
            for teacher in teachers
        ]
        first = self.members[0]
        self.config: Any = first.config
        self.head: Head = first.head
        for member in self.members[1:]:
            self.head = agree_on_task(self.head, member.head)
        self.name = " + ".join(member.name for member in self.members)
        self.input_names = set().union(*(member.input_names for member in self.members))
        self.weights, self.combine = _checked(weights, len(self.members)), combine
        self._alignments = [_align(first, member) for member in self.members]

    def __call__(self, inputs: Mapping[str, Any], needs: Needs) -> Activations:
        return self._combined(inputs, needs, lambda member, asked: member(inputs, asked))

    def answer(self, inputs: Mapping[str, Any], needs: Needs, dtype: torch.dtype | None = None) -> Activations:
        """What is needed for one batch, computed in `dtype`."""
        return self._combined(inputs, needs, lambda member, asked: member.answer(inputs, asked, dtype))

    def release(self) -> None:
        """Make room on the accelerator until the next question."""
        for member in self.members:
            member.release()

    def settle(self, problem: str) -> None:
        """Learn from the labels what kind of problem it is, where no config says so."""
        self.head = replace(self.head, problem_type=problem)

    def use_eager_attention(self) -> None:
        """Make the first teacher return its attention maps."""
        self.members[0].use_eager_attention()

    def fingerprint(self) -> str:
        """Changes with any teacher, any weight, and the way they are combined."""
        # How probabilities are combined depends on the problem too, which labels may settle.
        plain = self.combine == "logits" and not isinstance(self.weights, str)
        problem = [] if plain or not self._is_binary() else ["binary"]
        return fingerprint(*(m.fingerprint() for m in self.members), str(self.weights), self.combine, *problem)

    def _combined(
        self, inputs: Mapping[str, Any], needs: Needs, ask: Callable[[OnlineTeacher, Needs], Activations]
    ) -> Activations:
        first = self._alignments[0](ask(self.members[0], needs))
        if not needs.logits:
            return first
        logits = [first.logits]
        for member, alignment in zip(self.members[1:], self._alignments[1:], strict=True):
            logits.append(alignment(ask(member, Needs(logits=True))).logits)
        size = min(answer.shape[-1] for answer in logits if answer is not None)
        answers = torch.stack([materialised(answer).float()[..., :size] for answer in logits if answer is not None])
        if self.head.kind == "span":  # padding is no possible answer
            answers = torch.stack([materialised(self.head.at_positions(answer, inputs)) for answer in answers])
        return replace(first, logits=combine_logits(answers, self.weights, self.combine, self._is_binary()))

    def _is_binary(self) -> bool | None:
        """Whether each output is a yes or no of its own; `None` for a regression, whose outputs are no logits."""
        problem = self.head.problem(None)
        return None if problem == "regression" else problem == "multi_label_classification"


def combine_logits(
    logits: Tensor, weights: Sequence[float] | str, combine: str = "logits", binary: bool | None = False
) -> Tensor:
    """Logits of several teachers as those of one.

    Args:
        logits: Of each of K teachers.
        weights: K numbers that add up to 1, or `"confidence"`.
        combine: `"logits"` or `"probabilities"`.
        binary: Whether each logit is a yes or no of its own; `None` for plain numbers, which are averaged as they are.

    Shape:
        (K, ..., V) -> (..., V).

    >>> combine_logits(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), [0.5, 0.5])
    tensor([2., 0.])
    """
    if binary is None:
        factors = [1 / len(logits)] * len(logits) if isinstance(weights, str) else weights
        return torch.einsum("k,k...->...", torch.tensor(factors, dtype=logits.dtype, device=logits.device), logits)
    pairs = torch.stack([nn.functional.logsigmoid(-logits), nn.functional.logsigmoid(logits)], -1) if binary else None
    log_p = logits.log_softmax(-1) if pairs is None else pairs
    if isinstance(weights, str):
        entropy = -(log_p.exp() * log_p).sum(-1)  # (K, ...)
        log_w = (-entropy).log_softmax(0)
    else:
        shape = [-1] + [1] * (log_p.ndim - 2)
        log_w = torch.tensor(weights, dtype=logits.dtype, device=logits.device).log().reshape(shape)
    if combine == "logits":
        return (logits * (log_w.exp() if binary else log_w.exp()[..., None])).sum(0)
    mean = (log_p + log_w[..., None]).logsumexp(0)
    return mean[..., 1] - mean[..., 0] if binary else mean


def _checked(weights: Sequence[float] | str | None, count: int) -> list[float] | str:
    if weights is None:
        return [1 / count] * count
    if weights == "confidence":
        return "confidence"
    numbers = [float(weight) for weight in weights] if not isinstance(weights, str) else []
    if len(numbers) != count or not all(math.isfinite(w) and w >= 0 for w in numbers) or not sum(numbers) > 0:
        raise ValueError(
            f"weights must be {count} finite numbers of at least 0 that are not all 0, one a teacher, or "
            f"'confidence'; got {weights!r}."
        )
    return [weight / sum(numbers) for weight in numbers]


def _align(first: OnlineTeacher, other: OnlineTeacher) -> Alignment:
    if first is other:
        return Alignment()
    head: Head = agree_on_task(first.head, other.head)
    order = None
    ours: Any = first.config
    theirs: Any = other.config
    if has_label_names(first.model) and head.has_named_outputs:
        order = class_order(ours.id2label, theirs.id2label)
    return Alignment(order)
