"""`hf-distill` on every kind of data, and what stops it: one clear line, nothing half-written, and it goes on."""

import copy
import errno
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset, DatasetDict
from PIL import Image
from test_cli import NAMES, SIZES, SMALL
from test_transfer_set import bert
from test_vocabulary import CORPUS, byte_level, original

from hf_distill.cli import main
from hf_distill.cli.data import load_splits
from hf_distill.cli.models import load_model
from hf_distill.recipes import answers
from hf_distill.recipes.stages import last_whole_checkpoint
from hf_distill.tasks import Task
from hf_distill.writing import alone_in

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
TAGS = {"id2label": {0: "O", 1: "B", 2: "I"}, "label2id": {"O": 0, "B": 1, "I": 2}}
CATS = ("cat", "lynx", "tiger")
WORDS = {"tokens": [text.split() for text in CORPUS[:60]]}
WORDS["ner_tags"] = [[len(word) % 3 for word in row] for row in WORDS["tokens"]]
TEXTS = Dataset.from_dict({"text": CORPUS[:60], "label": [k % 2 for k in range(60)]})
LOCKED = "import sys, time; from pathlib import Path; from hf_distill.writing import alone_in\n" \
         "with alone_in(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher of each kind, and data of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    bert(**SIZES, **NAMES, initializer_range=0.5).save_pretrained(folder / "text")
    bert("TokenClassification", **SIZES, **TAGS, initializer_range=0.5).save_pretrained(folder / "words")
    for name in ("text", "words"):
        original("wordpiece").save_pretrained(folder / name)
    sizes = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2, "id2label": dict(enumerate(CATS))}
    names = {"label2id": {name: k for k, name in enumerate(CATS)}}
    hf.ViTForImageClassification(hf.ViTConfig(**sizes, **names, **SIZES)).save_pretrained(folder / "image")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "image" / "preprocessor_config.json").write_text(json.dumps(processor))
    draw = np.random.default_rng(0)
    for name in CATS:
        (folder / "pictures" / name).mkdir(parents=True)
        for k in range(14):
            pixels = draw.integers(0, 255, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{k}.png")
    TEXTS.to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps([dict(row) for row in TEXTS]))
    Dataset.from_dict(WORDS).to_json(folder / "words.jsonl")
    named = {**WORDS, "ner_tags": [["OBI"[k] for k in row] for row in WORDS["ner_tags"]]}
    Dataset.from_dict(named).to_parquet(folder / "named.parquet")
    return folder


def run(place, teacher, data, output, *more, part=()):
    small = [flag for flag in SMALL if flag not in ("--vocabulary_size", "120")]
    inputs = ["--teacher", str(place / teacher), "--dataset", str(place / data), "--output_dir", str(output)]
    return main([*part, *inputs, *small, "--baseline", "false", "--figures", "false", *more])


@pytest.mark.parametrize(
    ("teacher", "data", "task"),
    [
        ("text", "rows.parquet", "text-classification"),
        ("text", "rows.json", "text-classification"),
        ("words", "words.jsonl", "token-classification"),
        ("words", "named.parquet", "token-classification"),
        ("image", "pictures", "image-classification"),
    ],
)
def test_data_of_every_kind_gives_a_student_that_opens(place, tmp_path, teacher, data, task):
    pytest.importorskip("torchvision") if teacher == "image" and not hasattr(hf, "ViTImageProcessorPil") else None
    assert run(place, teacher, data, tmp_path) == 0
    row = str(next((place / "pictures").rglob("*.png"))) if teacher == "image" else CORPUS[70]
    assert hf.pipeline(task, model=str(tmp_path / "student"), device="cpu")(row)
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(
        example["picture"].startswith("data:image/png") == (teacher == "image") for example in report["mistakes"]
    )
    assert report["unit"] == ("words" if teacher == "words" else "rows")
    assert f"{report['judged']} {report['unit']} of the test data" in (tmp_path / "report.md").read_text()


def test_a_file_that_cannot_be_read_tells_where(place, tmp_path, capsys):
    (place / "broken.csv").write_text("text;label\nba;0\nco, di;1\n" * 5, encoding="utf-8")
    assert run(place, "text", "broken.csv", tmp_path / "out", part=["check"]) == 1
    assert "Expected 1 fields in line 3, saw 2" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_no_more_is_read_than_the_teacher_has_positions_for(kind):
    """RoBERTa's family counts from 2 on, so that 22 positions read 20 tokens."""
    torch.manual_seed(0)
    reader = copy.deepcopy(original("wordpiece")) if kind == "Bert" else byte_level()
    reader.model_max_length = int(1e30)
    positions = 20 if kind == "Bert" else 22
    sizes = {**SIZES, "vocab_size": len(reader), "num_attention_heads": 2, "pad_token_id": reader.pad_token_id}
    config = getattr(hf, f"{kind}Config")(**sizes, max_position_embeddings=positions)
    model = getattr(hf, f"{kind}ForSequenceClassification")(config).eval()
    text = " ".join(CORPUS[:20])
    rows = Dataset.from_dict({"text": [text], "label": [0]})
    found = answers(model, Task.of(model, rows), rows, reader)
    with torch.no_grad():
        expected = model(**reader([text], truncation=True, max_length=20, return_tensors="pt")).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_an_encoder_decoder_is_refused_at_once():
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    bart = hf.BartForSequenceClassification(hf.BartConfig(vocab_size=9, **sizes, **heads))
    with pytest.raises(ValueError, match="BartForSequenceClassification is an encoder-decoder"):
        Task.of(bart, TEXTS)


class TestOneProcess:
    def test_another_is_told_and_a_killed_one_blocks_nothing(self, place, tmp_path, capsys):
        command = [sys.executable, "-c", LOCKED, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
            try:
                assert other.stdout.readline() == "locked\n"
                assert run(place, "text", "rows.parquet", tmp_path, part=["cache"]) == 1
                assert f"Another process is at work in {tmp_path}" in capsys.readouterr().err
                assert not list(tmp_path.iterdir())
            finally:
                other.send_signal(signal.SIGKILL)
        with alone_in(tmp_path), alone_in(tmp_path):
            assert not list(tmp_path.iterdir())


class TestFullDisk:
    """A full disk in the place of each writer: one line, nothing half-written, and the same command goes on."""

    @pytest.mark.parametrize(
        ("owner", "name", "error"),
        [
            (hf.PreTrainedModel, "save_pretrained", OSError(errno.ENOSPC, "No space left on device")),
            (hf.PreTrainedTokenizerBase, "save_pretrained", OSError(errno.ENOSPC, "No space left on device")),
            (hf.Trainer, "_save_optimizer_and_scheduler", RuntimeError("file write failed")),
            (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
        ],
        ids=["start", "tokenizer", "checkpoint", "report"],
    )
    def test_is_told_in_one_line(self, place, tmp_path, capsys, monkeypatch, owner, name, error):
        def full(*args, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
            assert run(place, "text", "rows.parquet", tmp_path) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-distill")]
        assert len(lines) == 1
        assert f"No space is left on the disk of {tmp_path}" in lines[0]
        assert not (tmp_path / "report.json").exists()
        assert not [path for path in tmp_path.rglob(".*")]
        assert run(place, "text", "rows.parquet", tmp_path) == 0

    def test_a_checkpoint_that_was_cut_off_is_not_resumed(self, tmp_path):
        for step, state in ((1, "{}"), (2, '{"global_st'), (3, None)):
            (tmp_path / f"checkpoint-{step}").mkdir()
            if state is not None:
                (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_exported_students_stand_in_the_report(place, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers.exporters", reason="this release has no exporters")
    assert run(place, "text", "rows.parquet", tmp_path, "--export", "true") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["models"]) == {"teacher", "student", "onnx", "int8"}
    student, onnx = (report["models"][name] for name in ("student", "onnx"))
    assert onnx["metrics"]["accuracy"] == student["metrics"]["accuracy"]
    assert onnx["fidelity"]["retention"] == student["fidelity"]["retention"]
    size = sum(path.stat().st_size for path in (tmp_path / "export" / "onnx").glob("model.onnx*"))
    assert onnx["cost"]["disk_mb"] == pytest.approx(size / 1e6)
    assert set(onnx["cost"]["latency"]) == {"1", "32"}
    assert any(re.match(r"onnx, the exported student.*in 100\.0 % of them", note) for note in report["notes"])


def test_the_splits_of_multinli_are_found(tmp_path):
    """Its test has no labels, so that its validation is the test."""
    parts = {name: TEXTS for name in ("train", "validation_matched", "validation_mismatched")}
    hidden = TEXTS.map(lambda row: {"label": -1})
    DatasetDict({**parts, "test_matched": hidden, "test_mismatched": hidden}).save_to_disk(tmp_path / "mnli")
    data, notes = load_splits(str(tmp_path / "mnli"))
    assert list(data["test"]["text"]) == list(TEXTS["text"])
    assert len(data["train"]) + len(data["validation"]) == len(TEXTS)
    assert notes[0] == "the test split has no labels, so it is left out"


@pytest.mark.parametrize("part", [(), ("check",)])
def test_packages_that_an_export_needs_are_missed_before_anything_is_trained(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_distill.export.find_spec", lambda name: None)
    assert main([*part, "--teacher", "t", "--dataset", "d", "--output_dir", str(tmp_path), "--export", "true"]) == 1
    assert "needs onnx" in capsys.readouterr().err


def test_an_image_teacher_with_a_distillation_token_is_read(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.DeiTConfig(image_size=8, patch_size=4, **sizes)
    hf.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))) is hf.DeiTForImageClassificationWithTeacher


def test_the_student_without_a_teacher_is_that_of_this_start(place, tmp_path):
    """Another teacher, more texts or another length make another start, and with it another baseline."""
    job = [*command_for(place, "text", "rows.parquet", tmp_path / "out"), "--figures", "false"]
    model = tmp_path / "out" / "without_teacher" / "model" / "model.safetensors"
    assert main(job) == 0
    made = model.stat().st_mtime_ns
    assert main(job) == 0
    assert model.stat().st_mtime_ns == made
    assert main([*job, "--max_length", "5"]) == 0
    shorter = model.stat().st_mtime_ns
    assert shorter > made
    other = load_model(str(place / "text"))
    other.classifier.weight.data.mul_(-1)
    other.save_pretrained(tmp_path / "teacher")
    original("wordpiece").save_pretrained(tmp_path / "teacher")
    job[job.index("--teacher") + 1] = str(tmp_path / "teacher")
    assert main([*job, "--max_length", "5"]) == 0
    assert model.stat().st_mtime_ns > shorter


def command_for(place, teacher, data, output):
    return ["--teacher", str(place / teacher), "--dataset", str(place / data), "--output_dir", str(output), *SMALL]


def test_a_report_on_another_student_takes_no_baseline_and_no_other_classes(place, tmp_path, capsys):
    job = command_for(place, "text", "rows.parquet", tmp_path / "out")
    assert main([*job, "--figures", "false"]) == 0
    assert main(["report", *job, "--student", str(place / "text"), "--figures", "false"]) == 0
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())["models"]) == {"teacher", "student"}
    other = load_model(str(place / "text"))
    other.config.id2label, other.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    other.save_pretrained(tmp_path / "other")
    original("wordpiece").save_pretrained(tmp_path / "other")
    assert main(["report", *job, "--student", str(tmp_path / "other")]) == 1
    assert (
        "The student's classes are {0: 'yes', 1: 'no'}, the teacher's {0: 'no', 1: 'yes'}" in capsys.readouterr().err
    )


def test_prices_are_no_formulas(place, tmp_path):
    rows = {"text": [f"{text} US $%d and $%s or $$ {{" for text in CORPUS[:60]], "label": [k % 2 for k in range(60)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    teacher = load_model(str(place / "text"))
    teacher.config.id2label, teacher.config.label2id = {0: "$ $x", 1: "$$$"}, {"$ $x": 0, "$$$": 1}
    teacher.save_pretrained(tmp_path / "teacher")
    original("wordpiece").save_pretrained(tmp_path / "teacher")
    assert main([*command_for(tmp_path, "teacher", "rows.parquet", tmp_path / "out"), "--figures", "true"]) == 0
    assert "data:image/svg+xml" in (tmp_path / "out" / "report.html").read_text()


def test_a_file_with_semicolons_is_read_as_one_with_commas(place, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text;label\n" + "".join(f"{text};{k % 2}\n" for k, text in enumerate("abcd" * 10))
    )
    data, _ = load_splits(str(tmp_path / "rows.csv"))
    assert data["train"].column_names == ["text", "label"]
    assert data["train"][0]["label"] in (0, 1)
