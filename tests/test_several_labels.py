"""Rows with any number of labels: how they are read, learned and reported, against scikit-learn and plain loops."""

import json
import re

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Sequence
from sklearn.metrics import accuracy_score, f1_score, recall_score
from test_cli import SMALL, write_csv
from test_transfer_set import bert, vit
from test_vocabulary import CORPUS, original

from hf_distill.cli import main
from hf_distill.metrics import scores
from hf_distill.recipes import compress
from hf_distill.recipes.baseline import quality
from hf_distill.reports import DistillationReport
from hf_distill.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
NAMES = ["joy", "anger", "fear"]
GIVEN = {
    "problem_type": "multi_label_classification", "id2label": dict(enumerate(NAMES)),
    "label2id": {name: k for k, name in enumerate(NAMES)},
}  # fmt: skip
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "initializer_range": 0.5}
QUIET = {"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8}
HOT = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
LISTS = [[0, 2], [], [1], [2, 0, 1]]


def rows_of(column, texts=CORPUS[:4], name="labels"):
    return Dataset.from_dict({"text": list(texts), name: column})


class TestTask:
    @pytest.mark.parametrize(
        "column",
        [
            HOT, LISTS, [[value > 0 for value in row] for row in HOT], [[int(value) for value in row] for row in HOT],
            [[NAMES[k] for k in row] for row in LISTS], [[NAMES[k].upper() for k in row] for row in LISTS],
        ],
        ids=["floats", "numbers", "truth", "zeros and ones", "names", "names in capitals"],
    )  # fmt: skip
    def test_labels_are_read_as_lists_or_as_a_number_for_each_class(self, column):
        rows = rows_of(column)
        task = Task.of(bert(**GIVEN), rows)
        assert (task.label, task.classes, task.several) == ("labels", tuple(NAMES), True)
        assert task.labels(rows) == HOT
        assert "classification into 3 classes, several of them a row, of texts in 'text'" in str(task)

    def test_classes_are_matched_by_name(self):
        order = ["fear", "joy", "anger"]
        column = [[order.index(NAMES[k]) for k in row] for row in LISTS]
        rows = rows_of(column).cast_column("labels", Sequence(ClassLabel(names=order)))
        assert Task.of(bert(**GIVEN), rows).labels(rows) == HOT

    def test_a_named_column_of_full_rows_holds_classes_and_not_zeros_and_ones(self):
        rows = rows_of([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]])
        named = rows.cast_column("labels", Sequence(ClassLabel(names=NAMES)))
        assert Task.of(bert(**GIVEN), named).labels(named) == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]]
        assert Task.of(bert(**GIVEN), rows).labels(rows) == [[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]

    def test_a_batch_has_a_float_for_each_class(self):
        rows, reader = rows_of(LISTS), original("wordpiece")
        task = Task.of(bert(**GIVEN), rows)
        batch = task.collator(reader)(list(task.encode(rows, reader)))
        assert batch["labels"].dtype == torch.float32
        assert batch["labels"].tolist() == HOT

    @pytest.mark.parametrize("as_text", [False, True])
    def test_hidden_ones_are_marked_and_the_others_stay(self, as_text):
        """As those of the comments that Jigsaw's test leaves out; of csv files the numbers may be text."""
        column = [[0, 1, 0], [-1, -1, -1], [1, 0, 0], [0, 0, 0]]
        rows = rows_of([[str(value) for value in row] for row in column] if as_text else column)
        expected = [[float(value) if value >= 0 else -100.0 for value in row] for row in column]
        assert Task.of(bert(**GIVEN), rows).labels(rows) == expected

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ([0, 1, 2, 1], "holds 0, but the teacher gives several labels a row. Put all of a row into one column"),
            (
                [["joy"], ["hate"], [], []],
                r"holds \['hate'\], but the teacher's classes are \['joy', 'anger', 'fear'\]",
            ),
            ([[3], [0], [1], []], "holds 3, but the teacher has the classes 0 to 2"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, column, message):
        rows = rows_of(column)
        with pytest.raises(ValueError, match=message):
            Task.of(bert(**GIVEN), rows).labels(rows)


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 5)) < [0.5, 0.3, 0.2, 0.1, 0.02]).astype(int)

    def logits(skill):
        return (skill * (2 * labels - 1) + rng.normal(size=labels.shape)).astype(np.float32)

    return labels, {name: logits(skill) for name, skill in (("teacher", 2), ("student", 1.4), ("baseline", 1.1))}


@pytest.fixture(scope="module")
def report(answers):
    labels, sides = answers
    return DistillationReport.from_outputs(
        sides["student"], sides["teacher"], labels, baseline=sides["baseline"], class_names=list("abcde"),
        texts=[f"text {k}" for k in range(len(labels))],
    )  # fmt: skip


class TestScores:
    def test_they_are_scikit_learns(self, answers):
        labels, sides = answers
        given = sides["student"] > 0
        assert scores.micro_f1(given, labels) == pytest.approx(f1_score(labels, given, average="micro"))
        np.testing.assert_allclose(scores.label_f1(given, labels), f1_score(labels, given, average=None))
        assert scores.macro_f1_of_labels(given, labels) == pytest.approx(f1_score(labels, given, average="macro"))

    def test_a_label_that_is_nowhere_is_in_no_mean(self):
        given, right = np.array([[1, 0], [1, 0]]), np.array([[1, 0], [0, 0]])
        assert scores.macro_f1_of_labels(given, right) == pytest.approx(2 / 3)
        with pytest.raises(ValueError, match=r"must both be \(rows, labels\)"):
            scores.micro_f1(given, right[:1])

    def test_the_best_epoch_is_that_of_the_f1_and_of_equal_ones_the_likelier(self, answers):
        labels, sides = answers
        f1 = {name: quality(hf.EvalPrediction(logits, labels))["quality"] for name, logits in sides.items()}
        assert f1["baseline"] < f1["student"] < f1["teacher"]
        assert f1["student"] == pytest.approx(f1_score(labels, sides["student"] > 0, average="micro"), abs=1e-3)
        silent = [quality(hf.EvalPrediction(np.full(labels.shape, z), labels))["quality"] for z in (-9.0, -1.0)]
        assert silent[0] < silent[1] < 0


class TestReport:
    def test_its_metrics_are_scikit_learns(self, answers, report):
        labels, sides = answers
        given = sides["student"] > 0
        found = report.student.metrics
        assert found["accuracy"] == [pytest.approx(accuracy_score(labels, given))]
        assert found["micro_f1"] == [pytest.approx(f1_score(labels, given, average="micro"))]
        np.testing.assert_allclose(report.student.class_accuracy, recall_score(labels, given, average=None))
        assert report.class_counts == labels.sum(0).tolist()

    def test_fidelity_is_of_whole_rows(self, answers, report):
        _, sides = answers
        p, q = (scipy.special.expit(sides[name].astype(np.float64)) for name in ("teacher", "student"))
        divergence = (scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)).sum(-1).mean()
        assert report.student.fidelity["kl_to_teacher"] == [pytest.approx(divergence, rel=1e-5)]
        same = np.mean([set(np.flatnonzero(a > 0)) == set(np.flatnonzero(b > 0))
                        for a, b in zip(sides["student"], sides["teacher"], strict=True)])  # fmt: skip
        assert report.student.fidelity["agreement"] == [pytest.approx(same)]

    def test_retention_is_of_the_micro_f1_and_chance_is_the_best_constant_answer(self, answers, report):
        labels, sides = answers
        ours, theirs = (f1_score(labels, sides[name] > 0, average="micro") for name in ("student", "teacher"))
        every = [[bool(number >> k & 1) for k in range(5)] for number in range(32)]
        chance = max(
            f1_score(labels, np.tile(one, (400, 1)), average="micro", zero_division=0) for one in every
        )  # fmt: skip
        assert report.metric.name == "micro_f1"
        assert report.student.fidelity["retention"] == [pytest.approx(ours / theirs)]
        assert report.metric.chance == pytest.approx(chance)

    def test_the_error_of_the_gain_is_the_bootstraps(self, answers, report):
        labels, sides = answers

        def lead(rows):
            return np.subtract(*(f1_score(labels[rows], sides[name][rows] > 0, average="micro")
                                 for name in ("student", "baseline")))  # fmt: skip

        rng = np.random.default_rng(1)
        drawn = [lead(rng.integers(0, 400, 400)) for _ in range(400)]
        assert report.gain.mean == pytest.approx(lead(np.arange(400)))
        assert report.gain.row_error == pytest.approx(np.std(drawn), rel=0.1)

    def test_mistakes_show_all_labels_of_a_row(self, answers, report, tmp_path):
        labels, sides = answers
        wrong = [k for k in range(400) if ((sides["student"][k] > 0) != labels[k]).any()
                 and ((sides["teacher"][k] > 0) == labels[k]).all()]  # fmt: skip
        assert report.mistake_count == len(wrong)
        first = report.mistakes[0]
        row = int(first.text.removeprefix("text "))
        assert row in wrong
        assert first.label == (", ".join("abcde"[k] for k in np.flatnonzero(labels[row])) or "none")
        place = first.classes.index(first.label.split(", ")[0]) if labels[row].any() else 0
        logit = sides["teacher"][row]["abcde".index(first.classes[place])]
        assert first.answers["teacher"][place] == pytest.approx(scipy.special.expit(logit), rel=1e-5)
        assert report.class_similarity is None
        page = report.save(tmp_path)["report.html"].read_text()
        assert "micro F1" in page
        assert "Retention per class" in page


def sixty_rows():
    rng = np.random.default_rng(0)
    return rows_of([np.flatnonzero(row).tolist() for row in rng.random((60, 3)) < 0.4], CORPUS[:60])


class TestStudent:
    def test_learns_each_label_and_opens_in_a_pipeline(self, tmp_path):
        made = compress(
            bert(**GIVEN, **SIZES), original("wordpiece"), sixty_rows(), tmp_path, compression=3, vocabulary_size=120,
            augmented_rows=60, training_rows=160, arguments=QUIET,
        )  # fmt: skip
        classify = hf.pipeline("text-classification", model=str(made.folder), device="cpu", top_k=None)
        found = {each["label"]: each["score"] for each in classify(CORPUS[0])[0]}
        assert set(found) == set(NAMES)
        with torch.no_grad():
            logits = made.student(**made.processing_class(CORPUS[0], return_tensors="pt")).logits[0]
        for name, logit in zip(NAMES, logits.tolist(), strict=True):
            assert found[name] == pytest.approx(scipy.special.expit(logit), abs=1e-4)

    def test_images_have_several_labels_too(self, tmp_path):
        pixels = np.random.default_rng(0).random((12, 1, 8, 8)).tolist()
        rows = Dataset.from_dict({"pixel_values": pixels, "labels": [row[:2] for row in HOT] * 3})
        model = vit()
        model.config.problem_type = "multi_label_classification"
        made = compress(
            model, None, rows, tmp_path, compression=2, augmented_rows=12, training_rows=32, arguments=QUIET
        )
        assert made.student.config.problem_type == "multi_label_classification"

    @pytest.mark.parametrize("kind", ["lists", "a column for each class"])
    def test_the_command_reports_the_f1(self, tmp_path, kind):
        bert(
            **GIVEN, hidden_size=16, intermediate_size=32, num_hidden_layers=3, initializer_range=0.5
        ).save_pretrained(tmp_path / "teacher")
        original("wordpiece").save_pretrained(tmp_path / "teacher")
        rows, place = sixty_rows(), tmp_path / ("rows" if kind == "lists" else "rows.csv")
        if kind == "lists":
            rows.save_to_disk(place)
        else:
            with_columns = [
                [text, *(int(k in given) for k in range(3))] for text, given in zip(*rows[:].values(), strict=True)
            ]
            write_csv(place, with_columns, ("text", *NAMES))
        command = ["--teacher", str(tmp_path / "teacher"), "--dataset", str(place),
                   "--output_dir", str(tmp_path / "out"), *SMALL, "--figures", "false"]  # fmt: skip
        assert main(command) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["metric"]["name"] == "micro_f1"
        assert "top_k=None" in (tmp_path / "out" / "student" / "README.md").read_text()
        assert set(report["models"]) == {"teacher", "student", "baseline"}
        assert "multi_label" not in (tmp_path / "out" / "report.md").read_text()
        assert sum(report["class_counts"]) > 0
        assert "micro F1" in (tmp_path / "out" / "student" / "README.md").read_text()

    def test_the_command_leaves_out_rows_and_splits_without_labels(self, tmp_path, capsys):
        bert(**GIVEN, **SIZES).save_pretrained(tmp_path / "teacher")
        original("wordpiece").save_pretrained(tmp_path / "teacher")
        rows = sixty_rows()
        hot = [[int(k in given) for k in range(3)] for given in rows["labels"]]
        hot[3] = hot[50] = [-1, -1, -1]
        columns = {"text": rows["text"], **{name: [row[k] for row in hot] for k, name in enumerate(NAMES)}}
        parts = {"train": Dataset.from_dict(columns), "test": Dataset.from_dict({"text": ["a b", "c d"]})}
        DatasetDict(parts).save_to_disk(tmp_path / "rows")
        job = ["--teacher", str(tmp_path / "teacher"), "--dataset", str(tmp_path / "rows"), *SMALL]
        assert main(["check", *job, "--output_dir", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().out
        assert "the test split has no labels, so it is left out" in said
        assert len(re.findall("rows have nothing in labels and are left out", said)) >= 1


def test_a_single_label_of_which_a_row_may_have_none_is_no_regression(tmp_path):
    names = {"id2label": {0: "toxic"}, "label2id": {"toxic": 0}, "problem_type": "multi_label_classification"}
    bert(**names, **SIZES).save_pretrained(tmp_path / "teacher")
    original("wordpiece").save_pretrained(tmp_path / "teacher")
    rows_of([["toxic"] * (k % 2) for k in range(60)], CORPUS[:60]).to_parquet(tmp_path / "rows.parquet")
    job = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "teacher"), "--figures", "false",
           "--dataset", str(tmp_path / "rows.parquet"), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main(["report", *job]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metric"]["name"] == "micro_f1"
