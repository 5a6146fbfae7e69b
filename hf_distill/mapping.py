"""Which student layer learns from which teacher layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMapping:
    """Pairs of student and teacher layers, as `hidden_states` indices.

    Index 0 is the embedding output, index `k + 1` the output of block `k`, and the last index the final hidden state.
    Negative indices count from the end, as in Python.

    Make one with [`LayerMapping.uniform`], [`LayerMapping.last`] or [`LayerMapping.pairs`].

    >>> LayerMapping.uniform().resolve(student_layers=3, teacher_layers=12)
    ((1, 4), (2, 8), (3, 12))
    >>> LayerMapping.last().resolve(student_layers=2, teacher_layers=6)
    ((1, 5), (2, 6))
    >>> LayerMapping.pairs({0: 0, -1: -1}).resolve(student_layers=2, teacher_layers=6)
    ((0, 0), (2, 6))
    """

    strategy: str = "uniform"
    explicit: tuple[tuple[int, int], ...] = ()

    @classmethod
    def uniform(cls) -> LayerMapping:
        """Every student block, spread evenly over the teacher's, the last on the last (PKD-Skip, Sun et al., 2019)."""
        return cls("uniform")

    @classmethod
    def last(cls) -> LayerMapping:
        """Every student block, on the teacher's last blocks (PKD-Last, Sun et al., 2019)."""
        return cls("last")

    @classmethod
    def pairs(cls, pairs: Mapping[int, int]) -> LayerMapping:
        """Explicit pairs, `{student index: teacher index}`."""
        if not pairs:
            raise ValueError("LayerMapping.pairs needs at least one {student index: teacher index} pair, got none.")
        for index in (*pairs.keys(), *pairs.values()):
            if not isinstance(index, int) or isinstance(index, bool):
                raise ValueError(f"Layer indices must be whole numbers, got {index!r} in {dict(pairs)}.")
        return cls("pairs", tuple(pairs.items()))

    @classmethod
    def parse(cls, value: LayerMapping | Mapping[int, int] | Mapping[str, int] | str) -> LayerMapping:
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
        if value in ("uniform", "last"):
            return cls(value)
        raise ValueError(
            f"layer_mapping must be 'uniform', 'last' or a dict {{student index: teacher index}}, got {value!r}."
        )

    def resolve(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
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
        if self.strategy == "last":
            offset = teacher_layers - student_layers
            return tuple((k, k + offset) for k in range(1, student_layers + 1))
        # Rounded half up in integers: round() would send 2.5 down and 3.5 up.
        return tuple(
            (k, (2 * k * teacher_layers + student_layers) // (2 * student_layers))
            for k in range(1, student_layers + 1)
        )

    def _resolve_explicit(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
        resolved = tuple(
            (_in_range(student, student_layers, "student"), _in_range(teacher, teacher_layers, "teacher"))
            for student, teacher in self.explicit
        )
        for side, indices in zip(("student", "teacher"), zip(*resolved, strict=True), strict=True):
            if len(set(indices)) < len(indices):
                raise ValueError(
                    f"layer_mapping uses a {side} layer more than once: {dict(self.explicit)} means {resolved}. "
                    "Pair every layer at most once."
                )
        return resolved

    def __str__(self) -> str:
        return self.strategy if self.strategy != "pairs" else str(dict(self.explicit))


def _in_range(index: int, layers: int, side: str) -> int:
    if not -(layers + 1) <= index <= layers:
        raise ValueError(
            f"layer_mapping asks for {side} hidden state {index}, but the {side} has {layers} layers: use 0 "
            f"(embedding output) to {layers} (final hidden state)."
        )
    return index % (layers + 1)
