"""The one class that a loss derives from, and the weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_distill.activations import TRAITS, Activations, Head, Needs, Shapes
from hf_distill.batch import Batch, Over
from hf_distill.schedules import Moment, Schedule
from hf_distill.top_k import TopKLogits
from hf_distill.unprojected import Computed, UnprojectedLogits, computed, sum_over_chunks


class DistillationLoss(nn.Module):
    """A term of the objective: sees what two models returned, never the models.

    Derive from it, say what you read, and return one number made by `batch.mean`:

    >>> class LogitDistance(DistillationLoss):
    ...     student_needs = teacher_needs = Needs(logits=True)
    ...
    ...     def forward(self, student, teacher, batch):
    ...         ours, theirs = batch.predictions(student, teacher)  # (N, V) each
    ...         return batch.mean((ours.float() - theirs.float()).square().mean(-1))
    >>> LogitDistance(weight=0.3).weight
    0.3

    A loss may own parameters: build them in [`setup`]. They are trained, clipped, synchronised, saved and resumed with
    the student, and stay out of its weights.

    Args:
        weight: Factor of this term in the sum, at least 0; a number or a [`Schedule`].

    Attributes:
        student_needs: What the loss reads from the student. Hidden-state indices may be known only after [`setup`];
            until then ask for `hidden_states=True`.
        teacher_needs: The same for the teacher. Empty means that the teacher need not be run.
        over: What the mean counts (see [`Batch`]); weighs the batches of an evaluation against each other.
        couples_rows: True where a row's value depends on the other rows of the micro-batch.
        by_position: True where the loss reads logits alone, and its value is the sum of its values on parts of the
            positions that `over` names. Then the logits of a language model are never all computed at once. Holds for
            the `forward` or `compare` that stands in the same class; a class that overrides one has to say so again.
        reads_top_k: True where the loss takes any outcomes for classes, and so can compare the k likeliest classes and
            all others as one ([`TopKLogits`]) instead of the whole vocabulary.
        needs_distributions: True where attention maps must be distributions, which those of a training student with
            attention dropout are not.
        pools_tokens: True where hidden states are read as one vector a row, over each model's own tokens
            (`batch.of_teacher()` for the teacher's), so that the two may have different tokenizers.
        needs_labels: True where the loss reads hard labels.
        undefined_for: What the loss has no meaning for, with the reason and what to do instead: a kind of head, a
            problem, or `"two_classes"` (see `TRAITS`). The trainer refuses such a pair before the first step.
        formulas: What stands in the printed equation instead of [`formula`] for some problems, such as `"regression"`.
        fit_rows: How many training rows [`fit`] is shown before the first step; 0 where nothing is learned from data.
        citation: BibTeX of the sources, entries separated by an empty line.
    """

    student_needs: Needs = Needs(logits=True)
    teacher_needs: Needs = Needs(logits=True)
    over: Over = "predictions"
    couples_rows: bool = False
    by_position: bool = False
    reads_top_k: bool = False
    needs_distributions: bool = False
    pools_tokens: bool = False
    needs_labels: bool = False
    undefined_for: Mapping[str, str] = MappingProxyType({})
    formulas: Mapping[str, str] = MappingProxyType({})
    citation: str = ""
    fit_rows: int = 0

    weight: float
    fitted: Tensor

    def __init__(self, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self._schedules: dict[str, Schedule] = {}
        if self.fit_rows:  # part of the state, so that a resumed run does not learn it again
            self.register_buffer("fitted", torch.tensor(False))
        for value in self.schedule("weight", weight):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{type(self).__name__}: weight must be a finite number of at least 0, got {weight!r}."
                )

    def schedule(self, name: str, value: Any) -> tuple[Any, ...]:
        """Make the attribute `name` a number, or what a [`Schedule`] says at each moment; the values to check."""
        if not isinstance(value, Schedule):
            setattr(self, name, float(value) if name == "weight" and isinstance(value, int) else value)
            return (value,)
        self._schedules[name] = value
        setattr(self, name, value(Moment()))
        return value.values

    def at(self, moment: Moment) -> None:
        """Give scheduled numbers their values of this moment."""
        for name, schedule in self._schedules.items():
            setattr(self, name, schedule(moment))

    def shown(self, name: str) -> str:
        """A number, or its schedule, as it stands in the printed equation."""
        return str(self._schedules[name]) if name in self._schedules else f"{getattr(self, name):g}"

    @property
    def is_active(self) -> bool:
        """Whether the term ever counts."""
        schedule = self._schedules.get("weight")
        return self.weight > 0 if schedule is None else max(schedule.values) > 0

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """Build what depends on the two models, from the shapes of one dry forward. Called once, before training."""

    def fit(self, batches: Iterable[tuple[Activations, Activations, Batch]]) -> None:
        """Learn something from data into buffers that [`setup`] has made; called once, where `fit_rows` is above 0.

        The buffers are saved and resumed with the loss' parameters, and are those of the first process on all.

        Args:
            batches: What `forward` would be given, for `fit_rows` rows spread evenly over the training data. Only
                what is read of them is computed.
        """

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        """The term, without its weight. Shape: ()."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(student, teacher, batch).")

    def formula(self) -> str:
        """The term as it stands in the printed equation."""
        return type(self).__name__


class LossTerms(nn.ModuleDict):
    """Named losses, and their weighted sum.

    Args:
        losses: Name -> loss. The name becomes the log key `<name>_loss`.

    Raises:
        ValueError: If there is no loss, a name is unusable, or every weight is 0.
    """

    def __init__(self, losses: Mapping[str, DistillationLoss]) -> None:
        for name, loss in losses.items():
            if not isinstance(loss, DistillationLoss):
                raise ValueError(
                    f"losses[{name!r}] must be a DistillationLoss object, got {loss!r}. Derive your loss from "
                    "hf_distill.losses.DistillationLoss and pass an instance of it."
                )
            if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
                raise ValueError(
                    f"Losses are named by Python identifiers other than {sorted(_RESERVED)}, since the name becomes "
                    f"the log key '<name>_loss'; got {name!r}."
                )
        if len({id(loss) for loss in losses.values()}) < len(losses):
            raise ValueError(
                f"Every name needs a loss object of its own, but one stands under several of {list(losses)}. Make "
                "another with the same settings."
            )
        if not any(loss.is_active for loss in losses.values()):
            weights = {name: loss.weight for name, loss in losses.items()}
            raise ValueError(f"At least one loss needs a weight above 0, got {weights}.")
        super().__init__(losses)

    @property
    def student_needs(self) -> Needs:
        return Needs.union(loss.student_needs for loss in self.active().values())

    @property
    def teacher_needs(self) -> Needs:
        return Needs.union(loss.teacher_needs for loss in self.active().values())

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        for loss in self.active().values():
            if loss.fit_rows:
                loss.fitted.fill_(False)
            loss.setup(student_shapes, teacher_shapes)

    def refuse_undefined(self, head: Head, problem: str, shapes: Shapes | None = None) -> None:
        """Refuse losses that have no meaning for the task.

        Args:
            head: The models' head.
            problem: The batch's problem.
            shapes: The student's, where known.

        Raises:
            ValueError: Naming the loss and the reason.
        """
        classes = shapes.logits[-1] if shapes is not None and shapes.logits else None
        traits = head.traits(problem, classes)
        if classes == 1 and head.kind == "tokens":
            raise ValueError(
                "The models have one class for all tokens (num_labels=1), so that every answer is right: nothing can "
                "be learned. Give the config the classes of the data, at least two."
            )
        for name, loss in self.active().items():
            if unknown := set(loss.undefined_for) - set(TRAITS):
                raise ValueError(f"{type(loss).__name__}.undefined_for may name {TRAITS}, got {sorted(unknown)}.")
            for trait in traits:
                if trait in loss.undefined_for:
                    raise ValueError(
                        f"The loss {name!r} ({type(loss).__name__}) is not defined for this task ({trait}): "
                        f"{loss.undefined_for[trait]}."
                    )

    def forward(
        self,
        student: Activations,
        teacher: Activations | None,
        batch: Batch,
        replaced: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Every term that counts, without its weight. Shape: () each.

        Args:
            student: What the student returned.
            teacher: What the teacher returned; `None` leaves out the terms that need it.
            batch: Labels, masks and counts.
            replaced: Terms that were computed elsewhere.
        """
        known = dict(replaced or {})
        asked = {
            name: loss
            for name, loss in self.active().items()
            if name not in known and (teacher is not None or not loss.teacher_needs)
        }
        terms = {**evaluate_losses(asked, student, teacher or Activations(), batch), **known}
        return {name: terms[name] for name in self.active() if name in terms}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised. Shape: ()."""
        return torch.stack([self[name].weight * term for name, term in terms.items()]).sum()

    def equation(self, problem: str | None = None) -> str:
        """The sum in words, with its numbers.

        Args:
            problem: What the head is for ([`Head.problem`]), where a term is another one for it.
        """
        weights = {name: loss.shown("weight") for name, loss in self.active().items()}
        shown = {name: f"({weight})" if " " in weight else weight for name, weight in weights.items()}
        terms = {name: loss.formulas.get(problem or "") or loss.formula() for name, loss in self.active().items()}
        return " + ".join(f"{shown[name]} * {name}[{terms[name]}]" for name in shown)

    def at(self, moment: Moment) -> None:
        """Give all scheduled numbers their values of this moment."""
        for loss in self.active().values():
            loss.at(moment)

    def active(self) -> dict[str, DistillationLoss]:
        """The losses whose weight is above 0, now or at some other time."""
        return {name: loss for name, loss in self.items() if isinstance(loss, DistillationLoss) and loss.is_active}

    def needing_labels(self) -> list[str]:
        """The names of the active losses that read hard labels."""
        return [name for name, loss in self.active().items() if loss.needs_labels]

    def teacher_logits_over(self) -> Literal["predictions", "all_predictions"]:
        """Where the teacher's logits are read: `"predictions"`, if it is known that no loss looks elsewhere."""
        readers = [loss for loss in self.active().values() if loss.teacher_needs.logits]
        inside = self.by_position() and all(loss.over in ("labels", "predictions") for loss in readers)
        return "predictions" if inside else "all_predictions"

    def by_position(self) -> bool:
        """Whether no loss reads the logits otherwise than position by position."""
        return all(_is_by_position(loss) for loss in self.active().values() if _reads_logits(loss))

    def __getitem__(self, name: str) -> DistillationLoss:
        return super().__getitem__(name)  # type: ignore[return-value]


def evaluate_losses(
    losses: Mapping[str, DistillationLoss], student: Activations, teacher: Activations, batch: Batch
) -> dict[str, Tensor]:
    """Each loss without its weight; those on unprojected logits together, in one sweep over the positions.

    Shape:
        () each.
    """
    logits = student.logits
    if isinstance(teacher.logits, TopKLogits):
        refuse_top_k(losses)
    if not isinstance(logits, UnprojectedLogits):
        return {name: loss(student, teacher, batch) for name, loss in losses.items()}
    swept = {name: loss for name, loss in losses.items() if _reads_logits(loss)}
    others = {name: loss(student, teacher, batch) for name, loss in losses.items() if name not in swept}
    if not swept:
        return others
    where = batch.positions([loss.over for loss in swept.values()], logits)

    def rows_of_teacher(rows: slice) -> Computed | None:
        return None if teacher.logits is None else computed(teacher.logits[tuple(index[rows] for index in where)])

    def terms(ours: Tensor, theirs: Computed | None, rows: slice) -> Tensor:
        part = batch.part(tuple(index[rows] for index in where))
        return torch.stack([loss(Activations(ours), Activations(theirs), part) for loss in swept.values()])

    sums = sum_over_chunks(terms, logits[where], rows_of_teacher, [loss.weight for loss in swept.values()])
    return dict(zip(swept, sums.unbind(), strict=True)) | others


def refuse_top_k(losses: Mapping[str, DistillationLoss]) -> None:
    """Refuse losses that need all of the teacher's logits.

    Raises:
        ValueError: Naming the first.
    """
    for name, loss in losses.items():
        if loss.teacher_needs.logits and not loss.reads_top_k:
            raise ValueError(
                f"The loss {name!r} ({type(loss).__name__}) reads all of the teacher's logits, but only the likeliest "
                'classes were kept. Keep the answers with teacher_cache_logits="hidden_state", or use SoftTargetLoss '
                "without standardize."
            )


def _reads_logits(loss: DistillationLoss) -> bool:
    return loss.student_needs.logits or loss.teacher_needs.logits


def _is_by_position(loss: DistillationLoss) -> bool:
    defining = next(parent for parent in type(loss).__mro__ if {"forward", "compare"} & vars(parent).keys())
    return vars(defining).get("by_position", False)


# Each would collide with a log key of Trainer or of the module dictionary.
_RESERVED = frozenset({"train", "eval", "test", "distillation", "total"})
