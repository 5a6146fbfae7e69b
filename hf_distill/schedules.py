"""Numbers that change while training: weights and temperatures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """Where a training run is.

    Attributes:
        progress: 0 at its first optimizer step, 1 at its last.
        epoch: How many epochs are over, as a fraction.
    """

    progress: float = 0.0
    epoch: float = 0.0

    @classmethod
    def of(cls, step: int, steps: int, epoch: float) -> Moment:
        """The moment of a step, counted from 0, of a run of so many.

        >>> Moment.of(9, 10, 2.7)
        Moment(progress=1.0, epoch=2.7)
        """
        return cls(min(step / max(steps - 1, 1), 1.0), epoch)


@dataclass(frozen=True)
class Schedule:
    """A number as a function of the moment; it needs no state, so a resumed run goes on where it was.

    Build it with [`Schedule.linear`], [`Schedule.cosine`] or [`Schedule.stages`].
    """

    kind: str
    points: tuple[tuple[float, float], ...]

    @classmethod
    def linear(cls, start: float, end: float, until: float = 1.0) -> Schedule:
        """A straight line from `start` to `end`, which is reached at the progress `until` and kept.

        >>> Schedule.linear(4.0, 1.0)(Moment(progress=0.5))
        2.5
        """
        return cls._between("linear", start, end, until)

    @classmethod
    def cosine(cls, start: float, end: float, until: float = 1.0) -> Schedule:
        """Half a wave of the cosine from `start` to `end`, which is reached at the progress `until` and kept.

        >>> Schedule.cosine(1.0, 0.0)(Moment(progress=1.0))
        0.0
        """
        return cls._between("cosine", start, end, until)

    @classmethod
    def stages(cls, values: Mapping[int, float]) -> Schedule:
        """A value from each epoch on, counted from 0: `{0: 1.0, 3: 0.0}` is 1 for three epochs, then 0, as in
        TinyBERT's two stages (Jiao et al., 2020, section 3).

        Raises:
            ValueError: If no value is given for epoch 0.

        >>> [Schedule.stages({0: 1.0, 3: 0.0})(Moment(epoch=epoch)) for epoch in (0.0, 2.9, 3.0)]
        [1.0, 1.0, 0.0]
        """
        if 0 not in values or min(values) < 0:
            raise ValueError(f"The stages need a value from epoch 0 on, and none before; got {dict(values)}.")
        return cls("stages", tuple(sorted((float(epoch), float(value)) for epoch, value in values.items())))

    @property
    def values(self) -> tuple[float, ...]:
        """Its turning points; everything between them lies between them."""
        return tuple(value for _, value in self.points)

    def __call__(self, moment: Moment) -> float:
        """The number at a moment."""
        if self.kind == "stages":  # an epoch's fraction is a sum of fractions
            return next(value for epoch, value in reversed(self.points) if epoch <= moment.epoch + 1e-6)
        (_, start), (until, end) = self.points
        share = 1.0 if moment.progress >= until else moment.progress / until
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + share * (end - start)

    def __str__(self) -> str:
        if self.kind == "stages":
            return ", ".join(f"{value:g} from epoch {epoch:g}" for epoch, value in self.points)
        (_, start), (until, end) = self.points
        return f"{self.kind} {start:g} to {end:g}" + (f" until {until:g}" if until < 1 else "")

    @classmethod
    def _between(cls, kind: str, start: float, end: float, until: float) -> Schedule:
        if not 0.0 < until <= 1.0:
            raise ValueError(f"`until` is a share of the run, above 0 and at most 1; got {until}.")
        return cls(kind, ((0.0, float(start)), (float(until), float(end))))
