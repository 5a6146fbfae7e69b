"""Dark knowledge: what a teacher's soft answers say beyond the right class, and how much of it students absorb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.reports.answers import TestRows, by_chunk, chunks
from hf_distill.reports.quality import divergences, pearson

MAX_CLASSES = 2000  # a map has the square of this many numbers
SHOWN_CLASSES, SHOWN_PAIRS = 20, 10
CLEAR_ANSWER = 0.7  # the least probability, at temperature 1, of a teacher's answer that serves as an example


@dataclass(frozen=True)
class Example:
    """One test row and what each model says about it.

    Attributes:
        text: What the row says.
        label: What is right, a class name or a number.
        classes: The right one and every model's three likeliest, in the teacher's order; empty for regression.
        answers: Model -> probabilities of these classes; its number for regression.
        picture: A small picture of the row as a data URI, where it is an image.
    """

    text: str
    label: str
    classes: tuple[str, ...]
    answers: dict[str, list[float]]
    picture: str = ""


@dataclass(frozen=True)
class ClassSimilarity:
    """Which classes look alike to each model: its mean soft answer to the rows of every class.

    Attributes:
        classes: The classes shown: all, or those of the pairs that the teacher finds most alike.
        maps: Model -> (C, C) over these classes; row: the right class, column: the mean probability of each class.
        pairs: The teacher's most alike pairs: right class, other class, model -> mean probability of the other.
        absorbed: Model -> correlation of its whole map with the teacher's off the diagonal, one value a seed.
        temperature: Softens all answers.
    """

    classes: tuple[str, ...]
    maps: dict[str, list[list[float]]]
    pairs: list[tuple[str, str, dict[str, float]]]
    absorbed: dict[str, list[float]]
    temperature: float


def examples(
    rows: TestRows, positions: Sequence[int], models: Mapping[str, Tensor], temperature: float
) -> list[Example]:
    """The answers at some positions; `models` are logits, the teacher's first. Shape: name -> (N, V) or (N,)."""
    found = []
    for position in positions:
        at = {name: logits[position] for name, logits in models.items()}
        label, text, picture = rows.labels[position], rows.text(position), rows.picture(position)
        if rows.is_regression:
            answers = {name: [value.item()] for name, value in at.items()}
            found.append(Example(text, f"{label.item():.4g}", (), answers, picture))
            continue
        soft = {name: _softened(rows, logits / temperature) for name, logits in at.items()}
        teacher = next(iter(soft.values()))
        top = (answer.topk(min(3, len(answer))).indices.tolist() for answer in soft.values())
        right = label.nonzero().flatten().tolist() if rows.is_multi_label else [int(label)]
        mattering = set(right).union(*top)
        kept = sorted(mattering, key=lambda index: -teacher[index].item())
        answers = {name: answer[kept].tolist() for name, answer in soft.items()}
        names = tuple(rows.class_names[index] for index in kept)
        said = ", ".join(rows.class_names[index] for index in right) or "none"
        found.append(Example(text, said, names, answers, picture))
    return found


def _softened(rows: TestRows, logits: Tensor) -> Tensor:
    """Probabilities of the classes; of several labels a row each by itself. Shape: (V,) -> (V,)."""
    return logits.sigmoid() if rows.is_multi_label else logits.softmax(-1)


def telling_positions(rows: TestRows, teacher: Tensor, temperature: float, count: int) -> list[int]:
    """Rows whose soft answers say most: the teacher is right, gives its answer 70 % or more, and is otherwise as
    undecided as possible. One for each class first, then a second; none of several labels a row, whose answers do not
    add up. Shape: (N, V) -> count.
    """
    if rows.is_regression or rows.is_multi_label:
        return []
    confidence = by_chunk(lambda part: part.softmax(-1).amax(-1), teacher)
    entropy = by_chunk(lambda part: torch.distributions.Categorical(logits=part / temperature).entropy(), teacher)
    fit = (teacher.argmax(-1) == rows.labels) & (confidence >= CLEAR_ANSWER)
    ranked = [i for i in entropy.argsort(descending=True, stable=True).tolist() if fit[i]]
    turn: dict[int, int] = {}
    order = []
    for i in ranked:
        label = int(rows.labels[i])
        turn[label] = turn.get(label, 0) + 1
        order.append((turn[label], i))
    return [i for _, i in sorted(order, key=lambda pair: pair[0])[:count]]


def mistaken_positions(rows: TestRows, student: Tensor, teacher: Tensor, count: int) -> list[int]:
    """Where the student errs and the teacher does not, the largest KL(teacher || student) first; for regression where
    the student's error exceeds the teacher's most. Shape: (N, V), (N, V) -> count at most.
    """
    if rows.is_regression:
        excess = (student - rows.labels).abs() - (teacher - rows.labels).abs()
        fit, size = excess > 0, excess
    else:
        fit = ~rows.right(student) & rows.right(teacher)
        size = divergences(rows, student, teacher)
    return [i for i in size.argsort(descending=True, stable=True).tolist() if fit[i]][:count]


def class_similarity(
    rows: TestRows, teacher: Tensor, others: Mapping[str, Sequence[Tensor]], temperature: float, teacher_name: str
) -> ClassSimilarity | None:
    """The map that the teacher conveys and the others' likeness to it; `None` with less than three classes seen, or
    with more than 2000 classes, or where rows have several labels.

    Args:
        rows: The test rows.
        teacher: Logits, (N, V).
        others: Model -> logits of each seed.
        temperature: Softens all answers.
        teacher_name: The teacher's name in the maps.
    """
    seen = rows.labels[:0] if rows.is_regression or rows.is_multi_label else rows.labels.unique()
    if len(seen) < 3 or len(rows.class_names) > MAX_CLASSES:
        return None
    whole = mean_soft_answers(rows, teacher, temperature)[seen][:, seen]
    maps = {name: [mean_soft_answers(rows, x, temperature)[seen][:, seen] for x in several]
            for name, several in others.items()}  # fmt: skip
    off = ~torch.eye(len(seen), dtype=torch.bool)
    absorbed = {name: [pearson(each[off], whole[off]) for each in several] for name, several in maps.items()}
    every = {teacher_name: whole, **{name: several[0] for name, several in maps.items()}}
    count = min(SHOWN_CLASSES**2, len(seen) * (len(seen) - 1))
    largest = whole.masked_fill(~off, -1).flatten().topk(count)
    # Equal values in the order of their classes, on every machine.
    ranked = sorted(zip(largest.values.tolist(), largest.indices.tolist(), strict=True), key=_largest_first)
    pairs = [divmod(index, len(seen)) for _, index in ranked]
    shown = _shown(pairs, len(seen))
    names = [rows.class_names[index] for index in seen.tolist()]
    told = [
        (names[i], names[j], {name: each[i, j].item() for name, each in every.items()}) for i, j in pairs[:SHOWN_PAIRS]
    ]
    cut = {name: each[shown][:, shown].tolist() for name, each in every.items()}
    return ClassSimilarity(tuple(names[i] for i in shown), cut, told, absorbed, temperature)


def mean_soft_answers(rows: TestRows, logits: Tensor, temperature: float) -> Tensor:
    """Mean softened answer to the rows of each class, in float64; zeros for a class without rows. Shape: -> (V, V)."""
    classes = len(rows.class_names)
    sums = torch.zeros(classes, classes, dtype=torch.float64)
    for part, labels in chunks(logits, rows.labels):
        sums.index_add_(0, labels, (part / temperature).softmax(-1).double())
    return sums / rows.labels.bincount(minlength=classes).clamp(min=1)[:, None]


def _largest_first(pair: tuple[float, int]) -> tuple[float, int]:
    return -round(pair[0], 9), pair[1]


def _shown(pairs: Sequence[tuple[int, int]], classes: int) -> list[int]:
    """All classes where they are few, otherwise those of the foremost pairs; in their own order."""
    if classes <= SHOWN_CLASSES:
        return list(range(classes))
    chosen: set[int] = set()
    for pair in pairs:
        if len(chosen | set(pair)) <= SHOWN_CLASSES:
            chosen |= set(pair)
    return sorted(chosen)
