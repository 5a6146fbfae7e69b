"""A dataset by its name, file or folder, in three splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

from hf_distill.class_labels import flat
from hf_distill.cli.errors import UserError
from hf_distill.tasks import find_label_column

_LOADERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
}  # fmt: skip
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
_VALIDATION = ("validation", "valid", "dev", "val", "validation_matched")  # the last is MultiNLI's
_TEST = ("test", "test_matched")


def load_splits(
    source: str, config: str | None = None, label_column: str | None = None, classes: Sequence[str] = ()
) -> tuple[DatasetDict, list[str]]:
    """`train`, `validation` and `test` of a dataset, and what a reader must know of how they came to be.

    A tenth of `train` (1,000 rows at most) is held out where validation is missing, and validation is the test where
    that is missing or has no labels. The rows are drawn with a fixed seed.

    Args:
        source: A name on the Hub; a csv, tsv, json, jsonl or parquet file, also with .gz; a folder that `save_to_disk`
            wrote, of such files, or of images in one folder a class.
        config: The configuration of a dataset with several.
        label_column: The column of labels, where its name does not tell.
        classes: Those of a teacher that gives several labels a row: each may be a column of its own.

    Raises:
        UserError: If there is no such dataset, or a split is empty.
    """
    found = load_as_is(source, config)
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    notes: list[str] = []
    if "train" not in splits:
        raise UserError(f"{source} has the splits {', '.join(splits)}, but none called train.")
    validation = next((splits[name] for name in _VALIDATION if name in splits), None)
    test = next((splits[name] for name in _TEST if name in splits), None)
    label = label_column or find_label_column(splits["train"])
    own_columns = bool(classes) and label_column is None and set(classes) <= set(splits["train"].column_names)
    columns = list(classes) if own_columns else [label] if label is not None else []
    if test is not None and any(_unlabelled(test, column, splits["train"]) for column in columns):
        notes.append("the test split has no labels, so it is left out")
        test = None
    for name, part in (("train", splits["train"]), ("validation", validation), ("test", test)):
        if part is not None and not len(part):
            raise UserError(f"The {name} split of {source} is empty.")
    train = splits["train"]
    if test is None and validation is not None:
        notes.append("there is no labelled test split, so validation is the test")
        test, validation = validation, None
    if test is None:
        train, test = _held_out(train, "test", notes)
    if validation is None:
        train, validation = _held_out(train, "validation", notes)
    return DatasetDict({"train": train, "validation": validation, "test": test}), notes


def with_one_column_of_labels(data: DatasetDict, classes: Sequence[str]) -> DatasetDict:
    """Where each of a teacher's classes is a column of its own (of 0 and 1, as a csv file has to have them), these in
    one column `labels`; otherwise the data as it is.
    """
    names = list(classes)
    if not names or not set(names) <= set(data["train"].column_names) or "labels" in data["train"].column_names:
        return data

    def gathered(*columns: list[Any]) -> dict[str, Any]:
        return {"labels": [list(row) for row in zip(*columns, strict=True)]}

    return data.map(gathered, batched=True, input_columns=names, remove_columns=names)


def load_unlabelled(source: str) -> Dataset | list[str]:
    """More rows to learn from: all splits of a dataset (a name, file or folder), or the lines of a text file.

    Raises:
        UserError: If it cannot be read.
    """
    path = Path(source)
    if _kind(path) in _LOADERS or path.is_dir() or not (path.exists() or path.suffix == ".txt"):  # the last: a name
        found = load_as_is(source)
        return found if isinstance(found, Dataset) else concatenate_datasets(list(found.values()))
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--unlabelled {source} cannot be read ({error}).") from error


def _kind(path: Path) -> str:
    """How a file's name ends, without .gz."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix


def load_as_is(source: str, config: str | None = None) -> Dataset | DatasetDict:
    """A dataset with the splits that it has; for the arguments see [`load_splits`].

    Raises:
        UserError: If there is no such dataset.
    """
    path = Path(source)
    try:
        if path.is_file():
            kind = _kind(path)
            if kind not in _LOADERS:
                raise UserError(f"{source} is no file of a known kind. Give {', '.join(_LOADERS)}.")
            more = {"sep": "\t"} if kind == ".tsv" else {}
            found = load_dataset(_LOADERS[kind], data_files={"train": str(path)}, **more)
            names = found["train"].column_names
            sep = next((each for each in ";\t" if len(names) == 1 and each in names[0]), None)
            return found if sep is None else load_dataset("csv", data_files={"train": str(path)}, sep=sep)
        if path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return load_from_disk(source)
            images = any(file.suffix.lower() in _IMAGES for file in path.rglob("*"))
            return _images(path) if images else load_dataset(source, config)
        if path.suffix in _LOADERS:
            raise UserError(f"There is no file {source}.")
        return load_dataset(source, config)
    except UserError:
        raise
    except Exception as error:
        said = [line for each in (error, error.__cause__) for line in str(each or "").strip().splitlines()[:1]]
        why = ": ".join([type(error).__name__, *said])
        raise UserError(f"The dataset {source} cannot be loaded ({why}).") from error


def _images(folder: Path) -> DatasetDict:
    """Images in one folder a class; also where those of one split are not, which has no labels then."""
    found = load_dataset("imagefolder", data_dir=str(folder))
    parts = [name for name in ("train", *_VALIDATION, *_TEST) if (folder / name).is_dir()]
    if "label" in found["train"].column_names or parts[:1] != ["train"]:
        return found
    return DatasetDict({
        name: load_dataset("imagefolder", data_dir=str(folder / name), split="train") for name in parts
    })  # fmt: skip


def _unlabelled(part: Dataset, label: str, train: Dataset) -> bool:
    """Whether a split has no such labels, or hides all behind None or -1, as GLUE's do; -1 in `train` is a label."""
    if not len(part):
        return False
    if label not in part.column_names:
        return True
    ours, theirs = (
        {value for row in each.with_format(None)[label][:] for value in flat(row)} for each in (part, train)
    )
    hidden = {-1, -100} - theirs
    return all(value is None or value != value or value in hidden for value in ours)


def _held_out(train: Dataset, name: str, notes: list[str]) -> tuple[Dataset, Dataset]:
    number = min(1000, len(train) // 10)
    if not number:
        raise UserError(f"There are {len(train)} training rows, too few to hold out a tenth as {name}.")
    parts = train.train_test_split(number, seed=0)
    notes.append(
        f"there is no {name} split, so {number:,} rows of train are held out (a teacher that learned from them is "
        "judged too well)"
    )
    return parts["train"], parts["test"]
