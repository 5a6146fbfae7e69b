"""The curve of size against retention: every task it serves, on tiny models, and what its numbers mean."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = [f"w{i}" for i in range(40)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NAMES = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    verbosity = hf.logging.get_verbosity()
    yield import_module
    hf.logging.set_verbosity(verbosity)
    hf.logging.enable_progress_bar()


@pytest.fixture
def teacher(tmp_path):
    """Writes a teacher for a task, with what it reads with, and gives its folder."""
    torch.manual_seed(0)

    def make(kind):
        folder = tmp_path / "teacher"
        if kind == "image":
            hf.ViTForImageClassification(
                hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=2, **SIZES, **NAMES)
            ).save_pretrained(folder)
            return str(folder)
        (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        tokenizer = hf.BertTokenizerFast(str(tmp_path / "vocab.txt"))
        config = hf.BertConfig(vocab_size=len(tokenizer), num_labels=2, **SIZES, **NAMES)
        (hf.BertForTokenClassification if kind == "words" else hf.BertForSequenceClassification)(
            config
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def rows(kind, number, seed):
    draw = np.random.default_rng(seed)
    texts = [[WORDS[k] for k in draw.integers(40, size=draw.integers(3, 9))] for _ in range(number)]
    parity, label = [[int(word[1:]) % 2 for word in text] for text in texts], ClassLabel(names=["even", "odd"])
    if kind == "words":
        features = Features({"words": List(Value("string")), "tags": List(label)})
        return Dataset.from_dict({"words": texts, "tags": parity}, features)
    if kind == "image":
        pixels = draw.normal(size=(number, 1, 8, 8)).astype(np.float32)
        return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": [k % 2 for k in range(number)]})
    joined, labels = [" ".join(text) for text in texts], [values[0] for values in parity]
    columns = {"sentence1": joined, "sentence2": joined[::-1]} if kind == "pair" else {"text": joined}
    return Dataset.from_dict({**columns, "label": labels}).cast_column("label", label)


@pytest.mark.parametrize("kind", ["text", "pair", "words", "image"])
def test_each_task_gets_its_curve(kind, example, teacher, tmp_path, monkeypatch, capsys):
    data = DatasetDict({"train": rows(kind, 24, 0), "validation": rows(kind, 8, 1), "test": rows(kind, 12, 2)})
    data.save_to_disk(tmp_path / "data")
    rows(kind, 9, 3).to_parquet(tmp_path / "more.parquet")
    flags = [
        "--teacher", teacher(kind), "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
        "--compressions", "3", "--seeds", "2", "--training_rows", "48", "--augmented_rows", "8", "--batch_size", "8",
        "--learning_rates", "1e-3,1e-2", "--held_out", str(tmp_path / "more.parquet"), "--held_out_rows", "5",
    ]  # fmt: skip
    script, runs = example("size_vs_retention"), example("_size_runs")
    monkeypatch.setattr(sys, "argv", ["curve.py", *flags])
    script.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = {line["name"]: line for line in found["results"]}
    assert [line for line in lines if line.startswith("3x")] == ["3x " + name for name in
                                                                 (runs.RECIPE, runs.CARRIED, runs.RANDOM)]  # fmt: skip
    whole = lines["teacher"]["accuracy"][0]
    truth = np.concatenate([np.ravel(v) for v in data["test"]["tags" if kind == "words" else "label"]])
    chance = max(np.mean(truth == 0), np.mean(truth == 1))
    for name, line in lines.items():
        if name.startswith("3x"):
            assert [len(line[key]) for key in ("accuracy", "agreement", "held_out_agreement")] == [2, 2, 2]
            assert line["retention"] == pytest.approx([value / whole for value in line["accuracy"]])
            if whole > chance:
                above = [(value - chance) / (whole - chance) for value in line["accuracy"]]
                assert line["above_chance"] == pytest.approx(above)
    assert any("table" in name or "regression" in name for name in lines)
    assert "points over" in capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("What was trained is not trained again.")

    monkeypatch.setattr(runs, "train_on_labels", never)
    script.main()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


def test_each_baseline_takes_the_rate_that_is_best_on_validation(example, monkeypatch):
    runs = example("_size_runs")
    right = {1e-4: 1, 1e-3: 3, 1e-2: 2}  # of 4 validation rows
    asked = []
    some = runs.Runs.__new__(runs.Runs)
    some.rates, some.chosen, some.arguments, some.compression = list(right), {}, {}, 3.0
    some.start = type("Start", (), {"labels": lambda self, split: np.ones(4, int)})()

    def trained(name, rate, made, folder, seed):
        asked.append((name, rate, seed))
        return {"validation": (np.arange(4) < right[rate]).astype(int), "rate": rate}

    monkeypatch.setattr(some, "with_labels_alone", trained)
    assert some.baseline(runs.RANDOM, None, None, 0)["rate"] == 1e-3
    assert some.baseline(runs.RANDOM, None, None, 1)["rate"] == 1e-3
    assert asked == [(runs.RANDOM, rate, 0) for rate in right] + [(runs.RANDOM, 1e-3, 1)]


def test_a_narrow_student_without_a_teacher_learns_as_fast_as_the_recipes(example, monkeypatch, tmp_path):
    runs, seen = example("_size_runs"), {}
    student = hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=9, num_labels=2, **{**SIZES, "hidden_size": 64})
    )
    student.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "done.json").write_text('{"fingerprint": "x"}')
    some = runs.Runs.__new__(runs.Runs)
    some.arguments, some.content, some._rows = {}, {}, lambda *given: None
    task = type("Task", (), {"collator": lambda self, reader: None})()
    start = {"task": task, "job": type("Job", (), {"max_length": 8}), "answers": lambda self, model, reader: {}}
    some.start = type("Start", (), start)()
    monkeypatch.setattr(runs, "train_on_labels", lambda model, *rows, **given: seen.update(given) or model)
    made = type("Made", (), {"student": student, "training_rows": 8, "processing_class": None})()
    some.with_labels_alone(runs.CARRIED, 1e-3, made, tmp_path, 0)
    assert seen["learning_rate"] == pytest.approx(2.5e-3)  # 1e-3 is for a width of 160


def test_the_interval_of_a_sure_gain_is_narrow_and_that_of_noise_holds_zero(example):
    script = example("size_vs_retention")
    draw = np.random.default_rng(0)
    labels = np.zeros(400, int)
    noise = [{"test": draw.integers(2, size=400)} for _ in range(3)]
    other = [{"test": draw.integers(2, size=400)} for _ in range(3)]
    teacher, sure = {"test": labels}, [{"test": labels}] * 3

    def said(recipe, baseline):
        outputs = {"recipe": recipe, script.CARRIED: baseline, script.RANDOM: baseline}
        for output in recipe + baseline:
            output["parameters"] = np.array(1)
        lines = {name: script.line_of(name, some, teacher, labels) for name, some in outputs.items()}
        return script.intervals(lines, outputs, teacher, labels, np.ones(400, int))

    assert said(sure, sure).startswith("retention 100.0 % (100.0 to 100.0); +0.0 ± 0.0 points")
    gain, error = (float(part) for part in said(noise, other).split("; ")[1].split(" points")[0].split(" ± "))
    assert abs(gain) < error < 10
    # Two standard errors of a difference of two fair coins over 400 rows are 200 * sqrt(0.5 / 400) = 7.1 points for
    # one seed, and less for the mean of three.
    assert 200 * np.sqrt(0.5 / 1200) * 0.8 < error < 7.1 * 1.2


def test_of_a_teacher_that_is_never_right_no_share_is_kept(example):
    script = example("size_vs_retention")
    labels, wrong = np.zeros(4, int), {"test": np.ones(4, int), "parameters": np.array(1)}
    line = script.line_of("recipe", [wrong], wrong, labels)
    said = script.intervals({"recipe": line}, {"recipe": [wrong]}, wrong, labels, np.ones(4, int))
    assert said == "the teacher is never right, so that nothing can be kept"


def test_the_words_of_a_sentence_are_drawn_together(example):
    script = example("size_vs_retention")
    sums = script.by_row(np.array([[1.0, 0.0, 1.0, 1.0, 1.0]]), np.array([2, 0, 3]))
    assert sums.tolist() == [[1.0, 0.0, 3.0]]


def test_an_unknown_word_is_answered_by_its_longest_known_ending(example):
    counts = example("_counts")
    words = ["walking", "talking", "ring", "ring", "ring", "a", "a"]
    classes = [1, 1, 2, 2, 1, 3, -100]
    found, _ = counts.suffix_table(words, classes, ["ring", "king", "balking", "sing", "xyz", "a"])
    # "king" is an ending of two words of class 1; of "sing" the longest known one is "ing": 1 three times, 2 twice.
    assert found.tolist() == [2, 1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    "rows",
    [[f"好{k}看" if k % 2 else f"不{k}好看" for k in range(99)], [f"w{k}q" if k % 2 else f"v{k}q" for k in range(99)]],
)
def test_texts_of_which_no_two_share_a_word_are_counted_by_characters(example, rows):
    labels = np.arange(99) % 2
    found, size = example("_counts").tfidf(rows[:80], labels[:80], rows[80:])
    assert (found == labels[80:]).mean() > 0.9
    assert size > 80


def test_pixels_that_tell_the_class_are_learnt(example):
    pixels = np.random.default_rng(0).normal(size=(200, 9))
    labels = (pixels[:, 4] > 0).astype(int)
    found, size = example("_counts").on_pixels(pixels[:150], labels[:150], pixels[150:])
    assert (found == labels[150:]).mean() > 0.9
    assert size == 9


@pytest.fixture
def tasks():
    from hf_distill.tasks import Task

    return {
        "text": Task("text", ("text",), "label", ("a", "b")), "pair": Task("text", ("s", "t"), "label", ("a", "b")),
        "words": Task("words", ("words",), "tags", ("a", "b")), "image": Task("image", ("image",), "label", ("a",)),
    }  # fmt: skip


def test_lines_of_a_file_are_rows_of_the_task(example, tasks, tmp_path):
    read_rows = example("_size_options").read_rows
    (tmp_path / "plain.txt").write_text("a b\n\nc\n")
    (tmp_path / "pairs.txt").write_text("a b\tc\n")
    assert read_rows(str(tmp_path / "plain.txt"), tasks["text"])[:] == {"text": ["a b", "c"]}
    assert read_rows(str(tmp_path / "plain.txt"), tasks["words"])[:] == {"words": [["a", "b"], ["c"]]}
    assert read_rows(str(tmp_path / "pairs.txt"), tasks["pair"])[:] == {"s": ["a b"], "t": ["c"]}
    with pytest.raises(SystemExit, match="a tab in each line"):
        read_rows(str(tmp_path / "plain.txt"), tasks["pair"])
    with pytest.raises(SystemExit, match="since they are images"):
        read_rows(str(tmp_path / "plain.txt"), tasks["image"])
    rows("text", 12, 0).to_json(tmp_path / "rows.jsonl")
    assert len(read_rows(str(tmp_path / "rows.jsonl"), tasks["text"])) == 12
    with pytest.raises(SystemExit, match="lacks the column 'words'"):
        read_rows(str(tmp_path / "rows.jsonl"), tasks["words"])


def test_what_is_held_out_is_never_learnt_from(example, teacher, tmp_path):
    test = rows("text", 8, 2)
    train = concatenate_datasets([rows("text", 24, 0), test.select(range(3))])
    data = DatasetDict({"train": train, "validation": rows("text", 8, 1), "test": test})
    data.save_to_disk(tmp_path / "data")
    (tmp_path / "more.txt").write_text("w1 w2\nw3 w4\n")
    options = example("_size_options")
    start = options.Start.of(
        options.Sizes(teacher("text"), held_out=str(tmp_path / "more.txt"), data=str(tmp_path / "data"))
    )
    assert {"w1 w2", "w3 w4", *data["test"]["text"], *data["validation"]["text"]} == set(start.exclude())
    by_labels = example("_size_runs").Runs(start, 3).data["train"]
    assert by_labels.to_dict() == rows("text", 24, 0).to_dict()


def test_a_teacher_of_numbers_is_refused(example, teacher, tmp_path):
    folder = teacher("text")
    model = hf.BertForSequenceClassification.from_pretrained(folder, num_labels=1, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)
    rows("text", 40, 0).to_csv(tmp_path / "rows.csv")
    options = example("_size_options")
    with pytest.raises(SystemExit, match="must classify"):
        options.Start.of(options.Sizes(folder, data=str(tmp_path / "rows.csv")))
