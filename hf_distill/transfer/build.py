"""The transfer set: what the student learns the teacher's answers on, labelled or not."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Features, List, Value

from hf_distill.transfer.augment import AUGMENTATIONS, Words, text_of, words_of
from hf_distill.transfer.replace import neighbour_words, replace_words, word_table

ROWS_EACH, MOST_ROWS = 60, 120_000  # new rows, for each of the task's and in all
ATTEMPTS = 4  # to make as many rows as asked for, where short texts come out alike
SOURCE = "source"  # the column that tells where a row is from


def build_transfer_set(
    dataset: Dataset,
    input_columns: Sequence[str] | str,
    *,
    unlabelled: Iterable[Any] | Dataset = (),
    augment: Sequence[str] | None = None,
    augmented_rows: int | None = None,
    exclude: Iterable[Any] = (),
    seed: int = 0,
    masked_lm: Any = None,
    masked_lm_processing_class: Any = None,
    teacher: Any = None,
    processing_class: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """The task's own rows, unlabelled ones, and new ones made of the task's: texts for the teacher to judge.

    Every row stands there once; what also is in `exclude` is left out, so that nothing learns from held-out rows.

    Args:
        dataset: The task's training rows. Their labels are not used.
        input_columns: The column of texts or of lists of words, or the two columns of a pair.
        unlabelled: More rows: texts (or lists of words, or pairs) or a dataset with these columns.
        augment: How new rows are made, in equal parts: `"recombine"`, `"drop_words"`
            (`hf_distill.transfer.augment`), `"replace_words"` by a masked language model's, `"neighbour_words"` by the
            teacher's embeddings (`hf_distill.transfer.replace`; TinyBERT, Jiao et al., 2020). Of a pair one text is
            new, the other stays, but beside recombined clauses stands a text of any row. By default all that need no
            other model than the `teacher`, if there is one.
        augmented_rows: How many; by default 60 times the task's rows, 120,000 at most.
        exclude: Rows that must not be in it, such as the texts of validation and test splits.
        seed: The same seed makes the same rows.
        masked_lm: For `"replace_words"`: a model with a masked-LM head, or its name or folder.
        masked_lm_processing_class: Its tokenizer; of a name or folder by default the one that is there.
        teacher: For `"neighbour_words"`: the model whose input embeddings tell which words are alike.
        processing_class: Its tokenizer.
        cache_dir: Where to keep what `"replace_words"` has made, which takes long, for the next call to read.

    Returns:
        A dataset with the input columns and `source`: `"task"`, `"unlabelled"` or the name of the augmentation
        (`transfer_source` where a column of texts has that name).

    Raises:
        ValueError: If a column or an augmentation is unknown, or the model is missing that it needs.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a fine film, if long", "too loud"], "label": [1, 0]})
        >>> transfer = build_transfer_set(rows, "text", unlabelled=["a book"], augmented_rows=2)
        >>> transfer["source"][:3]
        ['task', 'task', 'unlabelled']
    """
    columns = [input_columns] if isinstance(input_columns, str) else list(input_columns)
    if augment is None:
        asked = () if processing_class is None or word_table(teacher) is None else ("neighbour_words",)
        augment = (*AUGMENTATIONS, *asked)
    makers: dict[str, Callable[..., list[Words]]] = {
        **AUGMENTATIONS,
        "replace_words": partial(
            replace_words, masked_lm=masked_lm, processing_class=masked_lm_processing_class, cache_dir=cache_dir
        ),
        "neighbour_words": partial(neighbour_words, teacher=teacher, processing_class=processing_class),
    }
    _check(dataset, columns, augment, makers)
    task = _rows(dataset, columns)
    _require_texts("The dataset", task, task[0][0], columns)
    more, held_out = _rows(unlabelled, columns), _rows(exclude, columns)
    _require_texts("unlabelled", more, task[0][0], columns)
    _require_texts("exclude", held_out, task[0][0], columns)
    number = min(ROWS_EACH * len(task), MOST_ROWS) if augmented_rows is None else augmented_rows
    rows = _Distinct(held_out)
    rows.add("task", task)
    rows.add("unlabelled", more)
    lacking, chosen = number, {name: makers[name] for name in augment}
    for attempt in range(ATTEMPTS):
        for source, some in _augmented(task, chosen, lacking, seed + 1000 * attempt):
            lacking -= rows.add(source, some)
        if lacking <= number // 10:
            break
    else:
        print(
            f"Transfer set: {number - lacking:,} new rows of the {number:,} asked for, since these texts make no more"
        )
    content: dict[str, Any] = {name: [row[i] for row in rows.rows] for i, name in enumerate(columns)}
    text = List(Value("string")) if task and not isinstance(task[0][0], str) else Value("string")
    where = SOURCE if SOURCE not in columns else f"transfer_{SOURCE}"
    features = Features({**dict.fromkeys(columns, text), where: Value("string")})
    return Dataset.from_dict({**content, where: rows.sources}, features)


def _check(dataset: Dataset, columns: Sequence[str], augment: Sequence[str], makers: Mapping[str, Any]) -> None:
    missing = [name for name in columns if name not in dataset.column_names]
    if missing or not 1 <= len(columns) <= 2:
        raise ValueError(f"input_columns={list(columns)} must be one or two columns of {dataset.column_names}.")
    unknown = [name for name in augment if name not in makers]
    if unknown:
        raise ValueError(f"augment must name some of {tuple(makers)}, got {unknown[0]!r}.")
    if not len(dataset):
        raise ValueError("The dataset has no rows to start from.")


def without_rows(dataset: Dataset, columns: Sequence[str], exclude: Iterable[Any]) -> Dataset:
    """The rows whose texts are not among others.

    Args:
        dataset: Rows.
        columns: Where their texts are.
        exclude: Rows as for [`build_transfer_set`].
    """
    held_out = _rows(exclude, columns)
    if not held_out or not len(dataset):
        return dataset
    rows = _rows(dataset, columns)
    for what, some in (("The dataset", rows), ("exclude", held_out)):
        _require_texts(what, some, rows[0][0], columns)
    keys = {_key(row) for row in held_out}
    kept = [k for k, row in enumerate(rows) if _key(row) not in keys]
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _rows(some: Iterable[Any] | Dataset, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """The texts of each row, one for each column.

    Raises:
        ValueError: If the rows are in splits, or have no such columns.
    """
    if isinstance(some, Mapping):
        raise ValueError(
            f"Unlabelled or excluded rows must be one dataset or list, got {type(some).__name__} with "
            f"{list(some)}. Pass one of these, or concatenate_datasets of several."
        )
    if isinstance(some, Dataset):
        _require_columns(some.column_names, columns)
        plain = some.with_format(None)
        return [tuple(row) for row in zip(*(plain[name] for name in columns), strict=True)]
    if isinstance(some, str):
        raise ValueError("Unlabelled or excluded rows must be a list of texts, got one text.")
    return [_row(row, columns) for row in some]


def _row(row: Any, columns: Sequence[str]) -> tuple[Any, ...]:
    if isinstance(row, Mapping):  # of a stream
        _require_columns(list(row), columns)
        return tuple(row[name] for name in columns)
    return (row,) if len(columns) == 1 or isinstance(row, str) else tuple(row)


def _require_columns(there: Sequence[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        raise ValueError(f"Unlabelled or excluded rows lack the column {missing[0]!r}: {list(there)}.")


def _require_texts(what: str, rows: Sequence[tuple[Any, ...]], like: Any, columns: Sequence[str]) -> None:
    """Rows of the task's kind: as many texts each as columns, or lists of words."""
    kind: Any = (list, tuple) if isinstance(like, (list, tuple)) else str
    for k, row in enumerate(rows):
        words = [word for text in row if kind is not str for word in (text if isinstance(text, kind) else ())]
        fits = all(isinstance(text, kind) for text in row) and all(isinstance(word, str) for word in words)
        if len(row) != len(columns) or not fits:
            unit = "a text" if kind is str else "a list of words"
            need = unit if len(columns) == 1 else f"a pair ({', '.join(columns)}) of texts"
            raise ValueError(f"{what}: row {k} must be {need}, got {row if len(row) > 1 else row[0]!r}.")


def _augmented(
    task: Sequence[tuple[Any, ...]], augment: Mapping[str, Callable[..., list[Words]]], number: int, seed: int
) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """New rows by each augmentation; of pairs the one text is new where the other stays.

    The other is that of the row from which the new one was made, so that related texts stay so (as in TinyBERT); what
    is made of several rows stands beside a text of any: one augmentation in three, if all are used.
    """
    parts = []
    for k, (name, make) in enumerate(augment.items()):
        share = number // len(augment) + (k < number % len(augment))
        sides, origins = [], []
        for side in range(len(task[0])):
            words = _Drawn(words_of(row[side]) if isinstance(row[side], str) else list(row[side]) for row in task)
            sides.append([_joined(made, task[0][side]) for made in make(words, share, seed + side)])
            origins.append(words.drawn)
        rows = [tuple(row) for row in zip(*sides, strict=True)]
        if len(sides) == 2:
            draw = random.Random(seed)
            rows = [_one_side(row, task, [of[k] if len(of) == share else draw.randrange(len(task)) for of in origins],
                              draw.random() < 0.5) for k, row in enumerate(rows)]  # fmt: skip
        parts.append((name, rows))
    return parts


class _Distinct:
    """Rows with where they are from, each of them once."""

    def __init__(self, excluded: Iterable[tuple[Any, ...]]) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.sources: list[str] = []
        self._seen = {_key(row) for row in excluded}

    def add(self, source: str, some: Iterable[tuple[Any, ...]]) -> int:
        """Add those that are not there yet and not empty; how many they are."""
        before = len(self.rows)
        for row in some:
            key = _key(row)
            if key not in self._seen and any(row):
                self._seen.add(key)
                self.rows.append(row)
                self.sources.append(source)
        return len(self.rows) - before


class _Drawn(list[Words]):
    """Texts that remember which of them were drawn: what is made of a single text draws one each time."""

    def __init__(self, texts: Iterable[Words]) -> None:
        super().__init__(texts)
        self.drawn: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.drawn.append(index)
        return super().__getitem__(index)


def _one_side(
    new: tuple[Any, ...], task: Sequence[tuple[Any, ...]], origins: Sequence[int], first: bool
) -> tuple[Any, ...]:
    return (new[0], task[origins[0]][1]) if first else (task[origins[1]][0], new[1])


def _joined(words: Words, like: Any) -> Any:
    return text_of(words) if isinstance(like, str) else words


def _key(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(text if isinstance(text, str) else tuple(text) for text in row)
