"""Which of the teacher's states a student of [`compress`] learns beside the answers, and how much they count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from hf_distill.losses import HiddenStateLoss
from hf_distill.recipes.reading import has_middle_state, has_readable_states, number_of_layers
from hf_distill.tasks import Task

STATES_PER_ANSWER = 16  # how much more the states of a text's tokens count, for which there is a single answer
STATES_BYTES = 10e9  # the most that states of all tokens may take on disk


@dataclass(frozen=True)
class States:
    """The teacher's states to learn.

    Attributes:
        layers: Indices of the teacher's hidden states; none where there are none to learn.
        positions: Whose: every token's, or the first's alone.
        factor: How many times more each counts than the stage says.
    """

    layers: tuple[int, ...] = ()
    positions: Literal["all", "first"] = "all"
    factor: int = 1

    @classmethod
    def of(
        cls, teacher: PreTrainedModel, student: PreTrainedModel | None, task: Task, batch: Mapping[str, Any],
        size: float,
    ) -> States:  # fmt: skip
        """Every token's final state, and of texts the one in the middle, where the disk has room.

        A text has one answer, but as many states as tokens, so that less of it is learned by heart. Of images, and of
        texts for whose tokens there is no room, the first's is compared; words have answers of their own, which say
        most.

        Args:
            teacher: Whose states they are.
            student: The student, where it is not one that is cut from the teacher.
            task: What it does.
            batch: A few rows as the teacher reads them, without labels.
            size: What the final states of all tokens take on disk, in bytes.
        """
        last, fits = number_of_layers(teacher), size <= STATES_BYTES
        if not last or (task.kind == "words" and not fits):
            return cls()
        if task.kind == "image" or not fits:
            return cls((last,) if has_readable_states(teacher, task, batch, every_token=False) else (), "first")
        if not has_readable_states(teacher, task, batch, every_token=True):
            return cls()
        if task.kind == "words":
            return cls((last,))
        models = [teacher, *filter(None, [student])]
        middle = 2 * size <= STATES_BYTES and all(has_middle_state(model, batch) for model in models)
        return cls((last // 2, last) if middle else (last,), "all", STATES_PER_ANSWER)

    def loss(self, weight: float, student: PreTrainedModel) -> HiddenStateLoss:
        """The distance between the states, each with this weight.

        The state in the teacher's middle is learned by the student's as far on the way; a student of one block has
        none.
        """
        pairs, blocks = {-1: -1}, number_of_layers(student)
        if len(self.layers) == 2 and blocks > 1:
            middle, last = self.layers
            pairs = {max(1, round(blocks * middle / last)): middle, **pairs}
        return HiddenStateLoss(pairs, "cosine", weight * self.factor * len(pairs), positions=self.positions)
