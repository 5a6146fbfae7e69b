"""Which rows the command takes, and which it leaves out and says so."""

import copy
import json
import re

import numpy as np
import pytest
import transformers as hf
from datasets import Dataset, DatasetDict
from PIL import Image
from test_cli import SIZES
from test_cli_inputs import CATS, TEXTS, WORDS, command_for, run
from test_cli_inputs import place as place_of_inputs
from test_transfer_set import bert
from test_vocabulary import CORPUS, byte_level, original

from hf_distill.cli import main
from hf_distill.cli.data import load_splits
from hf_distill.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
place = place_of_inputs


def test_unlabelled_rows_come_with_the_tasks_columns(place, tmp_path, capsys):
    more = Dataset.from_dict({"tokens": [text.split() for text in CORPUS[100:140]], "id": list(range(40))})
    more.to_parquet(tmp_path / "more.parquet")
    given = ["--augmented_rows", "0", "--json"]
    rows = []
    for flags in ([], ["--unlabelled", str(tmp_path / "more.parquet")]):
        assert run(place, "words", "words.jsonl", tmp_path / "out", *given, *flags, part=["cache"]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert rows[1] - rows[0] == len({tuple(row) for row in more["tokens"]} - {tuple(row) for row in WORDS["tokens"]})


def test_rows_without_a_text_are_left_out_and_told(place, tmp_path, capsys):
    """As pandas reads NA and null, and an empty cell."""
    texts = ["null", "NA", "", *CORPUS[:57]]
    lines = "".join(f"{text},{k % 2}\n" for k, text in enumerate(texts))
    (place / "gaps.csv").write_text(f"text,label\n{lines}", encoding="utf-8")
    assert run(place, "text", "gaps.csv", tmp_path / "out", "--augmented_rows", "0", part=["cache"]) == 0
    told = re.findall(r"(\d) (train|validation|test) rows have nothing in text", capsys.readouterr().out)
    assert sum(int(number) for number, _ in told) == 3


@pytest.mark.parametrize(("kind", "name"), [("text", "label"), ("words", "ner_tags")])
def test_rows_without_a_label_are_left_out_and_told(kind, name, place, tmp_path, capsys):
    content = copy.deepcopy(WORDS) if kind == "words" else TEXTS.to_dict()
    for k in (3, 20):
        content[name][k] = [None, *content[name][k][1:]] if kind == "words" else None
    Dataset.from_dict(content).to_parquet(place / "holes.parquet")
    assert run(place, kind, "holes.parquet", tmp_path / "out", "--augmented_rows", "0", part=["cache"]) == 0
    told = re.findall(rf"(\d) (train|validation|test) rows have nothing in {name}", capsys.readouterr().out)
    assert sum(int(number) for number, _ in told) == 2


def test_unlabelled_rows_without_the_columns_are_refused(place, tmp_path, capsys):
    TEXTS.rename_column("text", "body").to_json(tmp_path / "more.json")
    assert run(place, "text", "rows.parquet", tmp_path / "out", "--unlabelled", str(tmp_path / "more.json")) == 1
    assert "lack the column 'text'" in capsys.readouterr().err


def test_a_row_without_tokens_is_named():
    rows = Dataset.from_dict({"text": ["ba", ""], "label": [0, 1]})
    task = Task.of(bert(), rows)
    with pytest.raises(ValueError, match=r"Row 1 has nothing to read in 'text'.*Leave such rows out"):
        task.encode(rows, byte_level(hf.GPT2TokenizerFast))


def test_images_of_a_test_without_classes_are_left_out(place, tmp_path):
    for name in CATS:
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (4, 4), (k, k, k)).save(tmp_path / "images" / "train" / name / f"{k}.png")
    (tmp_path / "images" / "test").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "test" / "0.png")
    data, notes = load_splits(str(tmp_path / "images"))
    assert data["train"].features["label"].names == list(CATS)
    assert notes[0] == "the test split has no labels, so it is left out"


@pytest.mark.parametrize(
    ("train", "test", "hidden"),
    [
        ([0.5, 2.0], [-1.0, -1.0], True),  # STS-B
        ([-3, -1], [-2, -1], False),  # numbers below 0 are numbers
        ([-1, 0], [-1, -1], False),  # a class that is called so
        ([0, 1], [-1, -1], True),
        ([0.5, 2.0], [float("nan"), None], True),
    ],
)
def test_labels_are_hidden_where_train_has_none_of_their_kind(train, test, hidden, tmp_path):
    parts = {"train": train * 20, "validation": train * 5, "test": test * 5}
    DatasetDict({
        name: Dataset.from_dict({"text": [str(k) for k in range(len(labels))], "label": labels})
        for name, labels in parts.items()
    }).save_to_disk(tmp_path / "data")  # fmt: skip
    assert ("the test split has no labels, so it is left out" in load_splits(str(tmp_path / "data"))[1]) == hidden


def test_rows_whose_number_is_not_known_are_left_out(place, tmp_path, capsys):
    bert(num_labels=1, **SIZES).save_pretrained(tmp_path / "teacher")
    original("wordpiece").save_pretrained(tmp_path / "teacher")
    numbers = [float("nan") if k % 10 == 0 else k / 60 for k in range(60)]
    Dataset.from_dict({"text": CORPUS[:60], "label": numbers}).to_parquet(tmp_path / "rows.parquet")
    job = command_for(tmp_path, "teacher", "rows.parquet", tmp_path / "out")
    assert main([*job, "--figures", "false"]) == 0
    assert "rows have nothing in label and are left out" in capsys.readouterr().out
    assert np.isfinite(
        json.loads((tmp_path / "out" / "report.json").read_text())["models"]["teacher"]["metrics"]["mse"]
    )


def test_training_rows_that_all_stand_among_the_held_out_are_told(place, tmp_path, capsys):
    rows = Dataset.from_dict({"text": CORPUS[:3] * 20, "label": [0, 1, 0] * 20})
    DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / "data")
    assert main(command_for(place, "text", tmp_path / "data", tmp_path / "out")) == 1
    assert "All 60 training rows are among those that must not be learnt from" in capsys.readouterr().err
