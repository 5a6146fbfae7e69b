"""A dataset's labels as the places of a model's classes: by name, by number, or as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

IGNORED = -100


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """What a column of `ClassLabel`s, or of lists of them, calls its classes."""
    feature: Any = dataset.features[column]
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def in_order(column: Sequence[Any], classes: Sequence[str], names: Sequence[str] | None, label: str) -> list[Any]:
    """Labels as the places of classes; -100 for a hidden one.

    Args:
        column: A label a row, or a list of them.
        classes: The teacher's.
        names: What the data calls its classes, where it does.
        label: The column's name.

    Raises:
        ValueError: If the data's classes are not the teacher's.
    """
    values = {value for row in column for value in flat(row)}
    if any(isinstance(value, str) for value in values):
        return _placed(column, _by_name({str(value) for value in values}, classes, label))
    if names is None and (places := _numbers_that_are_names(values, classes)) is not None:
        return _placed(column, places)
    order = _order(names, classes, label)
    _require_range(column, len(classes), label)
    return _placed(column, {v: IGNORED if v < 0 else int(v) if order is None else order[int(v)] for v in values})


def multi_hot(column: Sequence[Any], classes: Sequence[str], names: Sequence[str] | None, label: str) -> list[Any]:
    """Labels of rows that have any number of them: 1.0 at each one's place among the classes, 0.0 elsewhere; -100.0
    where they are hidden behind -1.

    Args:
        column: A list a row, of labels, or with a 0 or 1 (or truth value) for each of the classes.
        classes: The teacher's.
        names: What the data calls its classes, where it does.
        label: The column's name.

    Raises:
        ValueError: If a row is no list, or the data's classes are not the teacher's.

    >>> multi_hot([["b"], [], ["c", "b"]], "abc", None, "labels")
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    >>> multi_hot([[0, 1, 0], [1, 1, 0]], "abc", None, "labels")
    [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """
    single = next((row for row in column if not isinstance(row, (list, tuple))), None)
    if single is not None:
        raise ValueError(
            f"{label!r} holds {single!r}, but the teacher gives several labels a row. Put all of a row into one "
            f"column: a list of their names or numbers, or one with a 0 or 1 for each of the {len(classes)} classes."
        )
    rows = [list(row) for row in column]
    known: dict[Any, float] = {0: 0.0, 1: 1.0, -1: -100.0, IGNORED: -100.0}
    if not {"0", "1"} & set(classes):
        known |= {"0": 0.0, "1": 1.0, "-1": -100.0}
    if names is None and all(len(row) == len(classes) and set(row) <= set(known) for row in rows):
        return [[known[value] for value in row] for row in rows]
    hot = []
    for places in in_order(rows, classes, names, label):
        row = [0.0] * len(classes)
        for place in places:
            if place != IGNORED:
                row[place] = 1.0
        hot.append(row)
    return hot


def flat(row: Any) -> list[Any]:
    """The labels of a row, be it one or many."""
    return list(row) if isinstance(row, list) else [row]


def _placed(column: Sequence[Any], places: Mapping[Any, int]) -> list[Any]:
    known = {str(value): place for value, place in places.items()}  # names beside numbers: all are text
    return [[known[str(v)] for v in row] if isinstance(row, list) else known[str(row)] for row in column]


def _numbers_that_are_names(values: set[Any], classes: Sequence[str]) -> dict[Any, int] | None:
    """Places where the classes have numbers or truth values for names, in another order than that of counting."""
    said = {value: str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
            for value in values}  # fmt: skip
    known = {value: _place(name, classes) for value, name in said.items()
             if isinstance(value, bool) or value >= 0 or name in classes}  # fmt: skip
    counting = list(classes) == [str(k) for k in range(len(classes))]
    if not known or None in known.values() or counting or values - {*known, -1, IGNORED}:
        return None
    return {value: place if (place := known.get(value)) is not None else IGNORED for value in values}


def _by_name(names: set[str], classes: Sequence[str], label: str) -> dict[str, int]:
    """Places of labels that are names themselves, or numbers that were read as text."""
    known = {name: _place(name, classes) for name in names}
    if None in known.values() and all(name.isdecimal() and int(name) < len(classes) for name in known):
        return {name: int(name) for name in known}
    foreign = sorted(name for name, place in known.items() if place is None)
    if foreign:
        raise ValueError(
            f"{label!r} holds {foreign[:5]}, but the teacher's classes are {list(classes)}. Map them to these names, "
            "or to their numbers."
        )
    return {name: place for name, place in known.items() if place is not None}


def _order(names: Sequence[str] | None, classes: Sequence[str], column: str) -> list[int] | None:
    """For each class of the data the teacher's index of it; `None` where they agree, or either has no names."""
    if names is None or all(name.startswith("LABEL_") for name in classes):
        if names is not None and len(names) != len(classes):
            raise ValueError(f"{column!r} has the classes {names}, but the teacher answers with {len(classes)}.")
        return None
    if [name.lower() for name in names] == [name.lower() for name in classes]:
        return None
    order = [_place(name, classes) for name in names]
    foreign = sorted({name for name, place in zip(names, order, strict=True) if place is None})
    if foreign:
        raise ValueError(
            f"The data's classes {list(names)} are not the teacher's, {list(classes)}: it does not know {foreign}. "
            "Rename them (dataset.cast_column with a ClassLabel), or fine-tune the teacher on this data."
        )
    return [place for place in order if place is not None]


def _place(name: str, classes: Sequence[str]) -> int | None:
    """Which class a name means: the one of that name, or else the only one that differs from it in case alone."""
    if name in classes:
        return classes.index(name)
    alike = [k for k, other in enumerate(classes) if other.lower() == name.lower()]
    return alike[0] if len(alike) == 1 else None


def _require_range(column: Sequence[Any], classes: int, name: str) -> None:
    values = np.concatenate([np.asarray(row).reshape(-1) for row in column]) if column else np.zeros(0)
    wrong = values[(values >= classes) | ((values < 0) & (values != IGNORED) & (values != -1)) | (values % 1 != 0)]
    if len(wrong):
        raise ValueError(
            f"{name!r} holds {wrong[0]:g}, but the teacher has the classes 0 to {classes - 1}. Pass the data that it "
            "was trained on, or name another label_column."
        )
