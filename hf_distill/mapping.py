"""Which student layer learns from which teacher layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Teachers = int | tuple[int, ...]  # the teacher's side of a pair: a layer, or several that are averaged
STRATEGIES = ("uniform", "first", "last")


@dataclass(frozen=True)
class LayerMapping:
    """Pairs of student and teacher layers, as `hidden_states` indices.

    Index 0 is the embedding output, index `k + 1` the output of block `k`, and the last index the final hidden state.
    Negative indices count from the end, as in Python.

    Make one with [`LayerMapping.uniform`], [`LayerMapping.first`], [`LayerMapping.last`] or [`LayerMapping.pairs`].

    >>> LayerMapping.uniform().resolve(student_layers=3, teacher_layers=12)
    ((1, 4), (2, 8), (3, 12))
    >>> LayerMapping.last().resolve(student_layers=2, teacher_layers=6)
    ((1, 5), (2, 6))
    >>> LayerMapping.pairs({0: 0, -1: -1}).resolve(student_layers=2, teacher_layers=6)
    ((0, 0), (2, 6))

    Several teacher layers may teach one student layer, by their average:

    >>> LayerMapping.pairs({1: (1, 2, 3), 2: (4, 5, 6)}).resolve(student_layers=2, teacher_layers=6)
    ((1, (1, 2, 3)), (2, (4, 5, 6)))
    """

    strategy: str = "uniform"
    explicit: tuple[tuple[int, Teachers], ...] = ()

    @classmethod
    def uniform(cls) -> LayerMapping:
        """Every student block, spread evenly over the teacher's, the last on the last (PKD-Skip, Sun et al., 2019)."""
        return cls("uniform")

    @classmethod
    def first(cls) -> LayerMapping:
        """Every student block, on the teacher's block of the same number."""
        return cls("first")

    @classmethod
    def last(cls) -> LayerMapping:
        """Every student block, on the teacher's last blocks (PKD-Last, Sun et al., 2019)."""
        return cls("last")

    @classmethod
    def pairs(cls, pairs: Mapping[int, int | Sequence[int]]) -> LayerMapping:
        """Explicit pairs, `{student index: teacher index}`, or `{student index: (teacher index, ...)}` to average."""
        if not pairs:
            raise ValueError("LayerMapping.pairs needs at least one {student index: teacher index} pair, got none.")
        explicit: tuple[tuple[int, Teachers], ...] = tuple(
            (
                student,
                teacher if isinstance(teacher, str | int) or not isinstance(teacher, Sequence) else tuple(teacher),
            )
            for student, teacher in pairs.items()
        )
        for student, teacher in explicit:
            for index in (student, *layers_of(teacher)):
                if not isinstance(index, int) or isinstance(index, bool):
                    raise ValueError(f"Layer indices must be whole numbers, got {index!r} in {dict(pairs)}.")
            if teacher == ():
                raise ValueError(
                    f"Student layer {student} needs at least one teacher layer, got none in {dict(pairs)}."
                )
        return cls("pairs", explicit)

    @classmethod
    def parse(cls, value: LayerMapping | Mapping[int, Any] | Mapping[str, Any] | str) -> LayerMapping:
        """What a user writes (a name, or a dict whose keys JSON may have turned into strings) as a mapping."""
        if isinstance(value, LayerMapping):
            return value
        if isinstance(value, Mapping):
            try:
                return cls.pairs({int(k) if isinstance(k, str) else k: teacher for k, teacher in value.items()})
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"layer_mapping must map whole numbers to whole numbers, got {value!r}: {error}"
                ) from None
        if value in STRATEGIES:
            return cls(value)
        raise ValueError(
            "layer_mapping must be 'uniform', 'first', 'last' or a dict {student index: teacher index}, got "
            f"{value!r}."
        )

    def resolve(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, Teachers], ...]:
        """The pairs for two models with so many blocks (one less than the length of `hidden_states`).

        Raises:
            ValueError: If an index is out of range or used twice, or the student has more blocks than the teacher.
        """
        if self.strategy == "pairs":
            return self._resolve_explicit(student_layers, teacher_layers)
        if student_layers > teacher_layers:
            raise ValueError(
                f"layer_mapping={self.strategy!r} needs a student with no more layers than the teacher, got "
                f"{student_layers} and {teacher_layers}. Pass explicit pairs instead, for example {{1: 1}}."
            )
        if self.strategy != "uniform":
            offset = teacher_layers - student_layers if self.strategy == "last" else 0
            return tuple((k, k + offset) for k in range(1, student_layers + 1))
        # Rounded half up in integers: round() would send 2.5 down and 3.5 up.
        return tuple(
            (k, (2 * k * teacher_layers + student_layers) // (2 * student_layers))
            for k in range(1, student_layers + 1)
        )

    def _resolve_explicit(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, Teachers], ...]:
        def teachers(asked: Teachers) -> Teachers:
            if isinstance(asked, int):
                return _in_range(asked, teacher_layers, "teacher")
            return tuple(_in_range(index, teacher_layers, "teacher") for index in asked)

        resolved = tuple((_in_range(s, student_layers, "student"), teachers(t)) for s, t in self.explicit)
        used = {"student": [s for s, _ in resolved], "teacher": [i for _, t in resolved for i in layers_of(t)]}
        for side, indices in used.items():
            if len(set(indices)) < len(indices):
                raise ValueError(
                    f"layer_mapping uses a {side} layer more than once: {dict(self.explicit)} means {resolved}. "
                    "Pair every layer at most once."
                )
        return resolved

    def __str__(self) -> str:
        return self.strategy if self.strategy != "pairs" else str(dict(self.explicit))


def layers_of(teachers: Teachers) -> tuple[int, ...]:
    """The teacher's side of a pair as a tuple, whether it is one layer or several.

    >>> layers_of(4), layers_of((3, 4))
    ((4,), (3, 4))
    """
    return teachers if isinstance(teachers, tuple) else (teachers,)


def _in_range(index: int, layers: int, side: str) -> int:
    if not -(layers + 1) <= index <= layers:
        raise ValueError(
            f"layer_mapping asks for {side} hidden state {index}, but the {side} has {layers} layers: use 0 "
            f"(embedding output) to {layers} (final hidden state)."
        )
    return index % (layers + 1)
