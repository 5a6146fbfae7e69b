"""`hf-distill` as a user meets it: a tiny job from end to end, its parts, and one clear line for each mistake."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict
from test_transfer_set import bert
from test_vocabulary import CORPUS, original

from hf_distill import DistillationTrainer
from hf_distill.cli import main
from hf_distill.cli.data import load_splits
from hf_distill.cli.errors import UserError
from hf_distill.recipes import answers

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
NAMES = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
SMALL = ["--compression", "3", "--vocabulary_size", "120", "--augmented_rows", "20", "--training_rows", "160",
         "--per_device_train_batch_size", "8", "--use_cpu", "--disable_tqdm", "true"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher and a file of 60 rows."""
    folder = tmp_path_factory.mktemp("cli")
    bert(**SIZES, **NAMES, initializer_range=0.5).save_pretrained(folder / "teacher")
    original("wordpiece").save_pretrained(folder / "teacher")
    write_csv(folder / "rows.csv", [(text, k % 2) for k, text in enumerate(CORPUS[:60])])
    return folder


def write_csv(path, rows, names=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def command(place, output, *more, part=(), dataset="rows.csv"):
    return [
        *part,
        "--teacher",
        str(place / "teacher"),
        "--dataset",
        str(place / dataset),
        "--output_dir",
        str(output),
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """The whole job, once."""
    output = tmp_path_factory.mktemp("done") / "out"
    assert main(command(place, output, "--figures", "false")) == 0
    return output


class TestRun:
    def test_writes_student_card_and_report(self, done):
        files = {path.relative_to(done).as_posix() for path in done.rglob("*") if path.is_file()}
        assert {"student/model.safetensors", "student/config.json", "student/tokenizer.json", "student/README.md",
                "report.json", "report.md", "report.html"} <= files  # fmt: skip
        assert not [name for name in files if "unfinished" in name]
        report = json.loads((done / "report.json").read_text())
        assert set(report["models"]) == {"teacher", "student", "baseline"}
        assert report["curves"]["student"]
        card = (done / "student" / "README.md").read_text()
        assert "knowledge-distillation" in card
        assert "retention" in card.lower()
        assert "AutoTokenizer" in card or "pipeline(" in card  # a student with its tokenizer
        assert re.search(r"transfer, 20 steps over \d\d rows: 1 \* soft.* \+ 32 \* representation", card)
        assert "in one stage, which had the arguments below" in card
        classify = hf.pipeline("text-classification", model=str(done / "student"), device="cpu")
        assert classify(CORPUS[70])[0]["label"] in ("no", "yes")

    def test_tells_its_task_and_prints_one_json_object_if_asked(self, place, done, capsys, monkeypatch):
        monkeypatch.setattr(DistillationTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
        assert main(command(place, done, "--figures", "false", "--json")) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["written"]["student"] == str(done / "student")
        assert "classification into 2 classes of texts in 'text', labels in 'label'" in err

    def test_the_table_stands_at_the_end(self, place, done, capsys):
        assert main(command(place, done, "--figures", "false")) == 0
        out = capsys.readouterr().out
        assert "retention" in out
        assert str(done / "report.html") in out

    def test_a_configuration_file_holds_flags_and_the_command_line_wins(self, place, tmp_path, capsys):
        file = tmp_path / "job.yaml"
        file.write_text(
            f"teacher: {place / 'teacher'}\ndataset: {place / 'rows.csv'}\ncompression: 2\nmax_length: 9\n"
        )
        more = ["--config", str(file), "--output_dir", str(tmp_path / "out"), "--vocabulary_size", "120", "--json"]
        assert main(["student", *more, "--compression", "3"]) == 0
        teacher = hf.AutoModel.from_pretrained(place / "teacher").num_parameters()
        assert json.loads(capsys.readouterr().out)["parameters"] < teacher / 2.5

    def test_interrupted_it_says_how_to_go_on(self, place, tmp_path, capsys, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(DistillationTrainer, "train", interrupt)
        assert main(command(place, tmp_path / "out")) == 130
        assert "goes on where it was" in capsys.readouterr().err
        assert not (tmp_path / "out" / "student").exists()


class TestParts:
    @pytest.mark.parametrize(
        ("more", "losses"), [([], {"soft", "representation"}), (["--hard_label_weight", "0.5"], {"soft", "hard"})]
    )
    def test_check_runs_one_gradient_a_loss_and_leaves_nothing(self, more, losses, place, tmp_path, capsys):
        assert main(command(place, tmp_path / "out", "--json", *more, part=["check"])) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["losses"]) == losses
        assert found["memory_mb"]["teacher"] > 0
        assert list((tmp_path / "out").iterdir()) == []

    def test_cache_asks_the_teacher_alone(self, place, tmp_path, capsys):
        assert main(command(place, tmp_path / "out", "--json", part=["cache"])) == 0
        assert json.loads(capsys.readouterr().out)["rows"] > 40
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers"}

    def test_report_is_made_again_of_what_is_there(self, place, done, capsys):
        before = json.loads((done / "report.json").read_text())["models"]["student"]["metrics"]
        assert main(command(place, done, "--figures", "false", part=["report"])) == 0
        assert json.loads((done / "report.json").read_text())["models"]["student"]["metrics"] == before

    def test_export_runs_what_it_wrote(self, place, done, capsys):
        pytest.importorskip("onnxruntime")
        assert main(command(place, done, "--json", part=["export"])) == 0
        assert set(json.loads(capsys.readouterr().out)["written"]) == {"onnx", "int8"}
        models = json.loads((done / "report.json").read_text())["models"]
        assert set(models) == {"teacher", "student", "baseline", "onnx", "int8"}
        assert models["onnx"]["fidelity"]["retention"] == models["student"]["fidelity"]["retention"]

    def test_a_student_from_elsewhere_is_reported_without_curves(self, place, done, tmp_path, capsys):
        more = ["--figures", "false", "--student", str(done / "student")]
        assert main(command(place, tmp_path, *more, part=["report"])) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert set(report["models"]) == {"teacher", "student"}
        assert not report["curves"]


class TestMistakes:
    """One line on stderr, exit code 1, and no student."""

    def fails(self, capsys, arguments, message, code=1):
        assert main(arguments) == code
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-distill")]
        assert len(err) == 1, err
        assert message in err[0]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--label_column", "stars"], "label_column='stars' is no column"),
            (["--input_columns", "body"], "must be columns of the data"),
            (["--unlabelled", "missing.txt"], "--unlabelled missing.txt cannot be read"),
            (["--divergence", "reverse_kl"], "--divergence has no place in the recipe"),
            (["--teacher_model_revision", "v1"], "--teacher_model_revision has no place in the recipe"),
            (["--push_to_hub", "true"], "--push_to_hub has no place in the recipe"),
            (["--eval_strategy", "epoch"], "--eval_strategy has no place in the recipe"),
            (["--unlabelled", "nobody/texts"], "nobody/texts cannot be loaded"),
            (["--unlabelled", "nobody/texts-v1.5"], "nobody/texts-v1.5 cannot be loaded"),
            (["--num_train_epochs", "3"], "Set --training_rows"),
            (["--config", "missing.yaml"], "--config missing.yaml cannot be read"),
            (["--compression", "900"], "No student of at most"),
        ],
    )
    def test_in_the_flags(self, place, tmp_path, capsys, more, message):
        self.fails(capsys, command(place, tmp_path / "out", *more), message)
        assert not (tmp_path / "out" / "student").exists()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([("ba co", 0), ("di", 3)] * 20, "holds 3, but the teacher has the classes 0 to 1"),
            ([], "cannot be loaded"),
            ([("ba", 0), ("co", 1)], "too few to hold out a tenth"),
        ],
    )
    def test_in_the_data(self, place, tmp_path, capsys, rows, message):
        write_csv(tmp_path / "bad.csv", rows)
        arguments = command(place, tmp_path / "out")
        arguments[arguments.index("--dataset") + 1] = str(tmp_path / "bad.csv")
        self.fails(capsys, arguments, message)

    def test_the_traceback_is_shown_if_asked_for(self, place, tmp_path, capsys):
        assert main(command(place, tmp_path / "out", "--compression", "900", "--traceback")) == 1
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err
        assert "hf-distill: No student of at most" in err

    def test_in_the_teacher(self, place, tmp_path, capsys):
        hf.BertModel(
            hf.BertConfig(vocab_size=305, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        ).save_pretrained(tmp_path / "headless")
        (tmp_path / "corrupt").mkdir()
        (tmp_path / "corrupt" / "config.json").write_text((place / "teacher" / "config.json").read_text())
        (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"not a checkpoint")
        expected = {"headless": "which does not classify", "corrupt": "cannot be read", "nowhere": "cannot be read"}
        for name, message in expected.items():
            arguments = command(place, tmp_path / "out")
            arguments[arguments.index("--teacher") + 1] = str(tmp_path / name)
            self.fails(capsys, arguments, message)

    def test_in_the_place_to_write(self, place, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        self.fails(capsys, command(place, tmp_path / "file"), "cannot be written")

    def test_what_is_missing_is_named(self, tmp_path, capsys):
        self.fails(capsys, ["--output_dir", str(tmp_path / "out"), "--dataset", "x.csv"], "--teacher is missing")

    def test_an_unknown_flag_is_argparses_to_refuse(self, place, tmp_path):
        with pytest.raises(SystemExit) as error:
            main(command(place, tmp_path / "out", "--no_such_flag", "1"))
        assert error.value.code == 2


class TestLoadSplits:
    def test_splits_that_are_there_stay_and_hidden_labels_are_no_test(self, tmp_path):
        rows = Dataset.from_dict({"text": CORPUS[:40], "label": [0, 1] * 20})
        hidden = Dataset.from_dict({"text": ["ba"] * 4, "label": [-1] * 4})
        DatasetDict({"train": rows, "validation": rows.select(range(8)), "test": hidden}).save_to_disk(
            tmp_path / "data"
        )
        data, notes = load_splits(str(tmp_path / "data"))
        assert list(data["test"]["text"]) == CORPUS[:8]
        assert len(data["train"]) == 36
        assert len(data["validation"]) == 4
        assert any("has no labels" in note for note in notes)
        assert any("validation is the test" in note for note in notes)

    @pytest.mark.parametrize(
        ("name", "given", "hidden"),
        [
            ("tags", None, [[-1, -1]] * 4), ("target", None, [-1] * 4), ("mood", "mood", [-1] * 4),
            ("label", None, [None] * 4), ("label", None, None),
        ],
    )  # fmt: skip
    def test_hidden_labels_are_seen_in_whatever_column(self, tmp_path, name, given, hidden):
        labels = [[0, 1]] * 8 if name == "tags" else [0, 1] * 4
        parts = {"train": labels * 3, "validation": labels, "test": hidden or []}
        data = {split: Dataset.from_dict({"text": CORPUS[: len(part)], name: part}) for split, part in parts.items()}
        if hidden is None:
            data["test"] = Dataset.from_dict({"text": CORPUS[:4]})
        DatasetDict(data).save_to_disk(tmp_path / "data")
        assert len(load_splits(str(tmp_path / "data"), label_column=given)[0]["test"]) == 8

    def test_held_out_rows_are_the_same_every_time_and_in_no_two_splits(self, place):
        first, second = (load_splits(str(place / "rows.csv"))[0] for _ in range(2))
        texts = [list(first[name]["text"]) for name in ("train", "validation", "test")]
        assert texts == [list(second[name]["text"]) for name in ("train", "validation", "test")]
        assert sum(map(len, texts)) == 60
        assert len({text for part in texts for text in part}) == len(set(CORPUS[:60]))

    @pytest.mark.parametrize(
        ("name", "message"), [("data.xyz", "no file of a known kind"), ("gone.csv", "There is no file")]
    )
    def test_what_is_no_dataset_is_refused(self, tmp_path, name, message):
        (tmp_path / "data.xyz").write_text("")
        with pytest.raises(UserError, match=message):
            load_splits(str(tmp_path / name))

    def test_class_labels_keep_their_names(self, tmp_path):
        rows = Dataset.from_dict({"text": CORPUS[:40], "label": [0, 1] * 20}).cast_column(
            "label", ClassLabel(names=["no", "yes"])
        )
        rows.save_to_disk(tmp_path / "data")
        assert load_splits(str(tmp_path / "data"))[0]["test"].features["label"].names == ["no", "yes"]


def test_the_report_compares_the_layers_of_both_models_although_they_read_other_tokens(done):
    layers = json.loads((done / "report.json").read_text())["layer_similarity"]
    student = hf.AutoConfig.from_pretrained(done / "student").num_hidden_layers
    assert np.shape(layers["similarity"]) == (student + 1, SIZES["num_hidden_layers"] + 1)
    assert len(layers["pairs"]) == student


def test_a_model_that_diverged_is_named(place, done, capsys, monkeypatch):
    def diverged(model, task, dataset, *args, **kwargs):
        found = answers(model, task, dataset, *args, **kwargs)
        found[1] = np.nan
        return found

    monkeypatch.setattr("hf_distill.cli.outcome.answers", diverged)
    assert main(command(place, done, "--figures", "false", part=["report"])) == 1
    assert "hold NaN or infinity: its training may have diverged" in capsys.readouterr().err


def test_the_same_command_gives_the_same_student_elsewhere(place, done, tmp_path):
    """Bit for bit."""
    assert main(command(place, tmp_path / "again", "--figures", "false", "--baseline", "false")) == 0
    ours, theirs = (
        hf.AutoModelForSequenceClassification.from_pretrained(p / "student").state_dict()
        for p in (done, tmp_path / "again")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_held_out_rows_that_stand_among_the_training_rows_teach_neither_student(place, tmp_path, monkeypatch):
    texts = {"train": CORPUS[:30] + CORPUS[40:43], "validation": CORPUS[30:40], "test": CORPUS[40:48]}
    parts = {name: {"text": some, "label": [k % 2 for k in range(len(some))]} for name, some in texts.items()}
    DatasetDict({name: Dataset.from_dict(part) for name, part in parts.items()}).save_to_disk(place / "splits")
    seen = {}
    monkeypatch.setattr(DistillationTrainer, "train", lambda self, **k: seen.setdefault(self.args.output_dir, self))
    main(command(place, tmp_path / "out", "--figures", "false", "--hard_label_weight", "0.5", dataset="splits"))
    rows = {folder.rsplit("/")[-1]: len(trainer.train_dataset) for folder, trainer in seen.items()}
    assert (rows["polish"], rows["without_teacher"]) == (30, 30)
