"""What the rows of a dataset are to a model's head: which columns it reads, which holds labels, how both are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import datasets
from datasets import Dataset, Value
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
)

from hf_distill.class_labels import IGNORED, class_names, flat, in_order, multi_hot
from hf_distill.heads import core_model, has_decoder_inputs, task_class

Kind = Literal["text", "words", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_OF: dict[Any, Kind] = {
    AutoModelForSequenceClassification: "text",
    AutoModelForTokenClassification: "words",
    AutoModelForImageClassification: "image",
}
# Names that are looked for first, in this order; a pair of names is a pair of texts.
_INPUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (
        ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
        ("text", "text_pair"), ("text1", "text2"),
        ("text",), ("sentence",), ("content",), ("review",),
    ),
    "words": (("tokens",), ("words",)),
    "image": (("pixel_values",), ("image",), ("img",)),
}  # fmt: skip
_LABELS = ("label", "labels", "ner_tags", "pos_tags", "tags", "fine_label", "coarse_label", "target", "score")


@dataclass(frozen=True)
class Task:
    """One of the tasks whose data can be read by itself: classification of texts, words or images, or regression.

    Attributes:
        kind: `"text"` (one text or a pair a row), `"words"` (a list of words a row, a label each), or `"image"`.
        inputs: The columns that the model reads.
        label: The column of labels; `None` where there is none.
        classes: What the labels are called, in the teacher's order; empty for regression.
        several: Whether a row has any number of labels instead of one.
    """

    kind: Kind
    inputs: tuple[str, ...]
    label: str | None
    classes: tuple[str, ...] = ()
    several: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dataset: Dataset,
        input_columns: Sequence[str] | str | None = None,
        label_column: str | None = None,
    ) -> Task:
        """Recognise the task by the model's head, and its columns by their names and types.

        Args:
            model: Teacher or student.
            dataset: Rows as they are, not tokenised.
            input_columns: The columns to read, where their names do not tell.
            label_column: The column of labels, likewise.

        Raises:
            ValueError: If the head is of another task, or a column is not there or not to be told from others.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The rows must be a datasets.Dataset, one split that is not streamed, got {type(dataset).__name__}. "
                'Pass for example data["train"].'
            )
        kind = _KIND_OF.get(task_class(model))
        if kind is None:
            raise ValueError(
                f"{type(core_model(model)).__name__} does not classify texts, words or images, the tasks whose data "
                "can be prepared here. Tokenise the data yourself and use DistillationTrainer."
            )
        config = core_model(model).config
        if has_decoder_inputs(model):
            raise ValueError(
                f"{type(core_model(model)).__name__} is an encoder-decoder, which cannot be distilled here. Fine-tune "
                "an encoder or a decoder-only model for the task, and take that as the teacher."
            )
        given = (input_columns,) if isinstance(input_columns, str) else tuple(input_columns or ())
        several = kind != "words" and config.problem_type == "multi_label_classification"
        named = kind == "words" or several or (config.num_labels > 1 and config.problem_type != "regression")
        classes = tuple(str(config.id2label[i]) for i in range(config.num_labels)) if named else ()
        label = find_label_column(dataset, kind, label_column, numbers=not named, classes=classes, several=several)
        inputs = given or _input_columns(dataset, kind, label)
        missing = [name for name in inputs if name not in dataset.column_names]
        if missing or len(inputs) > (2 if kind == "text" else 1):
            raise ValueError(f"input_columns={list(inputs)} must be columns of the data: {dataset.column_names}.")
        return cls(kind, tuple(inputs), label, classes, several)

    def __str__(self) -> str:
        what = {"text": "texts", "words": "words", "image": "images"}[self.kind]
        verb = f"classification into {len(self.classes)} classes" if self.classes else "regression"
        verb += ", several of them a row," if self.several else ""
        return f"{verb} of {what} in {' and '.join(map(repr, self.inputs))}, labels in {self.label!r}"

    def encode(self, dataset: Dataset, processing_class: Any, max_length: int | None = None) -> Dataset:
        """The rows as a model reads them: `input_ids` and so on, and `labels` where there are any.

        A word's label stands at its first token; the others have -100. Images are left to [`ImageRows`].

        Args:
            dataset: Rows with this task's columns.
            processing_class: The model's tokenizer.
            max_length: Tokens that are read of a row; by default what the tokenizer allows, 512 at most.

        Raises:
            ValueError: If a row has no tokens, or the labels are not the teacher's.
        """
        longest = longest_row(processing_class, max_length)
        labels = self.labels(dataset)
        words = self.kind == "words"

        def encoded(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            texts = [rows[name] for name in self.inputs]
            out = processing_class(*texts, truncation=True, max_length=longest, is_split_into_words=words)
            _require_tokens(out["input_ids"], indices, self.inputs)
            result = {name: out[name] for name in out if name in processing_class.model_input_names}
            if labels is not None and words:
                _require_one_each(texts[0], labels, indices)
                result["labels"] = [labels_at_first_tokens(out.word_ids(k), labels[i]) for k, i in enumerate(indices)]
            elif labels is not None:
                result["labels"] = [labels[i] for i in indices]
            return result

        # Without a column `labels`, whose type these would be given: a float would become a whole number.
        return dataset.select_columns(list(self.inputs)).map(
            encoded, batched=True, with_indices=True, remove_columns=list(self.inputs), load_from_cache_file=False,
            desc="Tokenising",
        )  # fmt: skip

    def labels(self, dataset: Dataset) -> list[Any] | None:
        """The labels in the teacher's order of classes; numbers for regression; a 0.0 or 1.0 for each class where a
        row has several; `None` where there are none.

        Raises:
            ValueError: If the data's classes are not the teacher's.
        """
        if self.label is None or self.label not in dataset.column_names:
            return None
        column = dataset.with_format(None)[self.label][:]
        if any(value is None for row in column for value in flat(row)):
            raise ValueError(f"{self.label!r} holds None in some rows. Leave them out: dataset.filter(...).")
        if self.several:
            return multi_hot(column, self.classes, class_names(dataset, self.label), self.label)
        if self.kind != "words" and any(isinstance(row, (list, tuple)) for row in column):
            raise ValueError(
                f"{self.label!r} holds several labels or numbers a row, but the teacher gives one. If it gives "
                "several labels, set teacher.config.problem_type = 'multi_label_classification'. Several numbers "
                "cannot be prepared here: tokenise the data yourself and use DistillationTrainer."
            )
        if not self.classes:
            return [float(value) for value in column]
        return in_order(column, self.classes, class_names(dataset, self.label), self.label)

    def collator(self, processing_class: Any) -> Any:
        """What makes a batch of encoded rows."""
        if self.kind == "image":
            return DefaultDataCollator()
        return (DataCollatorForTokenClassification if self.kind == "words" else DataCollatorWithPadding)(
            processing_class
        )


def labels_at_first_tokens(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """A label for each token: the word's at its first, -100 at all others.

    >>> labels_at_first_tokens([None, 0, 0, 1, None], [7, 8])
    [-100, 7, -100, 8, -100]
    """
    firsts = [word is not None and (k == 0 or word_ids[k - 1] != word) for k, word in enumerate(word_ids)]
    return [labels[word] if first else IGNORED for word, first in zip(word_ids, firsts, strict=True)]  # type: ignore[index]


def longest_row(processing_class: Any, max_length: int | None) -> int:
    """Tokens that are read of a row."""
    return int(min(max_length or 512, processing_class.model_max_length))


def _require_one_each(words: Sequence[Any], labels: Sequence[Any], rows: Sequence[int]) -> None:
    for row, some in zip(rows, words, strict=True):
        if len(some) != len(labels[row]):
            raise ValueError(f"Row {row} has {len(some)} words, but {len(labels[row])} labels. Each needs one.")


def _require_tokens(ids: Sequence[Sequence[int]], rows: Sequence[int], columns: Sequence[str]) -> None:
    empty = [row for row, some in zip(rows, ids, strict=True) if not len(some)]
    if empty:
        raise ValueError(
            f"Row {empty[0]} has nothing to read in {' and '.join(map(repr, columns))}: the tokenizer makes no token "
            "of it. Leave such rows out, for example by dataset.filter(...)."
        )


def _input_columns(dataset: Dataset, kind: str, label: str | None) -> tuple[str, ...]:
    for names in _INPUTS[kind]:
        if set(names) <= set(dataset.column_names):
            return names
    fits = [name for name, feature in dataset.features.items() if name != label and _fits(feature, kind)]
    if len(fits) == 1:
        return tuple(fits)
    raise ValueError(
        f"Which column holds the {'images' if kind == 'image' else 'texts'} cannot be told: {fits or 'none'} would "
        f"do, of {dataset.column_names}. Name it: input_columns=..."
    )


def find_label_column(
    dataset: Dataset, kind: str = "text", given: str | None = None, *, numbers: bool = False,
    classes: Sequence[str] = (), several: bool = False,
) -> str | None:  # fmt: skip
    """The column of labels, by its name or because it holds classes; `None` where there is none.

    Args:
        dataset: Rows as they are.
        kind: Of [`Task`].
        given: Its name, where that does not tell.
        numbers: Whether the labels are numbers to be predicted, so that a column of numbers comes first.
        classes: The teacher's. Of several columns the one that holds these comes first, such as `pos_tags` beside
            `ner_tags`.
        several: Whether a row has any number of labels, so that a column of lists comes first.

    Raises:
        ValueError: If the given one is not there.
    """
    if given is not None:
        if given not in dataset.column_names:
            raise ValueError(f"label_column={given!r} is no column of the data: {dataset.column_names}.")
        return given
    known = [name for name in _LABELS if name in dataset.column_names]
    known += [n for n in dataset.column_names if n not in known and class_names(dataset, n) is not None]
    if kind == "words":
        known = [name for name in known if _is_list(dataset.features[name])]
    if numbers:
        known.sort(key=lambda name: not _is_number(dataset.features[name]))
    if classes and len(known) > 1:
        known.sort(key=lambda name: _misfit(dataset, name, classes))
    if several:
        known.sort(key=lambda name: not _is_list(dataset.features[name]))
    return known[0] if known else None


def _misfit(dataset: Dataset, column: str, classes: Sequence[str]) -> int:
    """How many of the teacher's classes a column does not have; one more than there are if it has others."""
    rows = [row for row in dataset.with_format(None)[column][:] if row is not None]
    names = class_names(dataset, column)
    try:
        found = {place for row in in_order(rows, classes, names, column) for place in flat(row)} - {IGNORED}
    except (TypeError, ValueError):
        return len(classes) + 1
    return len(classes) - len(found if names is None else names)


def _is_number(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "bool")


def _fits(feature: Any, kind: str) -> bool:
    if kind == "image":
        return isinstance(feature, datasets.Image) or (_is_list(feature) and _is_list(feature.feature))
    if _is_list(feature) != (kind == "words"):
        return False
    inner = feature.feature if kind == "words" else feature
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")


def _is_list(feature: Any) -> bool:
    return hasattr(feature, "feature")
