"""What the models said about the test rows, brought into one shape: logits (N, V) beside labels (N,)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_distill.reports.thumbnails import thumbnail

IGNORED = -100
CHUNK = 1 << 24  # numbers that are worked on at once

# One array (N, V) or (N, T, V); or a list of them, one for each seed.
Answers = Any
Texts = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class TestRows:
    """The rows that everything is measured on: what is asked, and what is right.

    Attributes:
        labels: (N,), classes or numbers; the positions that are judged, one after the other. (N, V) truth values where
            rows have any number of labels.
        places: (N, 2), row and position of each; the position is -1 where a row has one answer.
        problem: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        shape: What logits must have before the classes.
        class_names: One for each class; empty for regression.
        texts: What a row says, for the examples; strings, or a list of tokens for each row.
        images: What a row shows, for the examples.
    """

    labels: Tensor
    places: Tensor
    problem: str
    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    texts: Texts = field(default=(), repr=False)
    images: Sequence[Any] = field(default=(), repr=False)
    __test__ = False  # no test, whatever pytest takes it for

    @classmethod
    def of(
        cls,
        teacher: Tensor,
        labels: Any,
        *,
        problem: str = "auto",
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        texts: Texts | None = None,
        images: Sequence[Any] | None = None,
    ) -> TestRows:
        """Find out what kind of answers these are; the shapes of the teacher's logits and of the labels decide.

        Raises:
            ValueError: If logits and labels do not fit, or nothing is labelled.
        """
        label = torch.as_tensor(labels).detach().cpu()
        problem = _problem(teacher, label, problem)
        if problem != "single_label_classification":
            label = label.reshape(len(label)).double() if problem == "regression" else label.bool()
            places = torch.stack([torch.arange(len(label)), torch.full((len(label),), -1)], dim=1)
            shape: tuple[int, ...] = (len(label),)
        else:
            shape = tuple(label.shape)
            places = torch.nonzero(label != IGNORED)
            label = label[tuple(places.T)].long()
            if places.shape[1] == 1:
                places = torch.cat([places, torch.full_like(places, -1)], dim=1)
        if problem == "regression" and not bool(label.isfinite().all()):
            raise ValueError(f"{int((~label.isfinite()).sum())} labels are NaN or infinite. Leave these rows out.")
        if not len(label):
            raise ValueError("A report needs labelled test rows, got none (or every label is -100).")
        names = _class_names(class_names, 0 if problem == "regression" else teacher.shape[-1])
        if problem == "single_label_classification" and not 0 <= int(label.min()) <= int(label.max()) < len(names):
            raise ValueError(
                f"Labels must lie in 0 to {len(names) - 1} (or be -100), as the logits have {len(names)} classes, got "
                f"{int(label.min())} to {int(label.max())}."
            )
        if texts is not None and len(texts) != shape[0]:
            raise ValueError(f"There must be one text for each of the {shape[0]} test rows, got {len(texts)}.")
        if images is not None and len(images) != shape[0]:
            raise ValueError(f"There must be one image for each of the {shape[0]} test rows, got {len(images)}.")
        return cls(label, places, problem, shape, names, *(() if each is None else each for each in (texts, images)))

    @property
    def is_regression(self) -> bool:
        """Whether answers are numbers instead of classes."""
        return self.problem == "regression"

    @property
    def is_multi_label(self) -> bool:
        """Whether a row has any number of labels."""
        return self.problem == "multi_label_classification"

    @property
    def class_counts(self) -> Tensor:
        """In how many rows each class is right; empty for regression. Shape: (V,)."""
        if self.is_regression:
            return torch.zeros(0, dtype=torch.long)
        return self.labels.sum(0) if self.is_multi_label else self.labels.bincount(minlength=len(self.class_names))

    def right(self, logits: Tensor) -> Tensor:
        """Where the answers are right: of several labels a row, where all are. Shape: (N, V) -> (N,)."""
        return (chosen(self, logits) == self.labels).reshape(len(self.labels), -1).all(-1)

    @property
    def by_token(self) -> bool:
        """Whether a row has an answer for each of its tokens."""
        return len(self.shape) > 1

    def select(self, logits: Any, whose: str) -> Tensor:
        """The logits of the judged positions. Shape: (N, V); (N,) for regression.

        Raises:
            ValueError: If they are not the logits of these rows, or not finite.
        """
        given = _tensor(logits)
        wanted = self.shape if self.is_regression else (*self.shape, len(self.class_names))
        if self.is_regression and given.ndim == 2 and given.shape[-1] == 1:
            given = given[:, 0]
        if tuple(given.shape) != wanted:
            raise ValueError(
                f"The logits of the {whose} must have the shape {wanted} of these test rows and classes, got "
                f"{tuple(given.shape)}. Run all models on the same rows, in the same order."
            )
        if not self.is_regression:
            given = given[tuple(self.places[:, : len(self.shape)].T)]
        if not bool(given.isfinite().all()):
            raise ValueError(f"The logits of the {whose} hold NaN or infinity: its training may have diverged.")
        return given.float()

    def picture(self, position: int) -> str:
        """The position's row as a small picture; empty where it is no image."""
        return thumbnail(self.images[int(self.places[position, 0])]) if len(self.images) else ""

    def text(self, position: int) -> str:
        """What the position says: its row's text, or its token between its neighbours; the row's number if unknown."""
        row, token = self.places[position].tolist()
        if not len(self.texts):
            return f"row {row}" if token < 0 else f"row {row}, token {token}"
        said = self.texts[row]
        if isinstance(said, str):
            return said if token < 0 else f"{said} (token {token})"
        tokens = list(said)
        if token < 0:
            return " ".join(tokens)
        if token >= len(tokens):
            return f"row {row}, token {token}"
        left, right = " ".join(tokens[max(0, token - 6) : token]), " ".join(tokens[token + 1 : token + 7])
        return f"{left} [{tokens[token]}] {right}".strip()


def chosen(rows: TestRows, logits: Tensor) -> Tensor:
    """The likeliest class; of several labels a row, whether each is likelier than not.

    Shape:
        (N, V) -> (N,); of several labels (N, V).
    """
    return logits > 0 if rows.is_multi_label else logits.argmax(-1)


def seeds(answers: Answers) -> list[Any]:
    """One array for each seed.

    >>> len(seeds([torch.zeros(4, 2), torch.zeros(4, 2)])), len(seeds(torch.zeros(4, 2)))
    (2, 1)
    """
    several = isinstance(answers, (list, tuple)) and len(answers) > 0 and hasattr(answers[0], "shape")
    several = several and len(answers[0].shape) > 0
    return list(answers) if several else [answers]


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several (N, V) or (N,), a piece at a time: many classes shall not need much memory."""
    width = max((tensor.shape[-1] for tensor in tensors if tensor.ndim > 1), default=1)
    return zip(*(tensor.split(max(1, CHUNK // width)) for tensor in tensors), strict=True)


def by_chunk(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of rows, applied piece by piece. Shape: (N, V)... -> (N, ...)."""
    return torch.cat([function(*pieces) for pieces in chunks(*tensors)])


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().cpu()


def _problem(logits: Tensor, labels: Tensor, problem: str) -> str:
    known = ("auto", "regression", "single_label_classification", "multi_label_classification")
    if problem not in known:
        raise ValueError(f"A report is made for {', '.join(known[1:])}, got problem={problem!r}.")
    got = f"logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)}"
    if problem == "auto":
        one_number = logits.ndim == 1 or (logits.ndim == 2 and logits.shape[-1] == 1)
        several = logits.ndim == 2 and logits.shape == labels.shape
        problem = "multi_label_classification" if several else "single_label_classification"
        problem = "regression" if one_number else problem
    if problem == "regression":
        if logits.numel() != labels.numel() or labels.ndim < 1 or len(labels) != labels.numel():
            raise ValueError(f"Regression needs one number and one label a row, got {got}.")
    elif problem == "multi_label_classification":
        if logits.ndim != 2 or logits.shape != labels.shape or not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(f"Several labels a row need logits and labels (rows, classes), these 0 or 1, got {got}.")
    elif labels.is_floating_point() or logits.shape[:-1] != labels.shape or not 1 <= labels.ndim <= 2:
        raise ValueError(
            f"Classification needs logits (rows, classes) and whole-number labels (rows,), or (rows, tokens, classes) "
            f"and (rows, tokens), got {got}. Spans are not reported."
        )
    return problem


def _class_names(names: Sequence[str] | Mapping[int, str] | None, classes: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(index) for index in range(classes))
    if isinstance(names, Mapping):  # config.id2label
        names = [names[key] for key in sorted(names, key=int)]
    if classes and len(names) != classes:
        raise ValueError(f"The logits have {classes} classes, but there are {len(names)} class names.")
    return tuple(str(name) for name in names) if classes else ()
