"""Students as ONNX files: the student in PyTorch is the oracle, ONNX Runtime by itself the reader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from hf_distill import export
from hf_distill import exported as exported_files
from hf_distill.testing import tiny_task

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters", reason="this release has no exporters")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|google|ml_dtypes).*")
TASKS = ("single_label", "token", "image")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Task -> student, folder and figures; made once, since tracing takes seconds."""
    made = {}

    def make(name):
        if name not in made:
            folder, task = tmp_path_factory.mktemp(name) / "export", tiny_task(name)
            task.student.save_pretrained(folder.parent / "student")
            (folder.parent / "student" / "tokenizer.json").write_text("{}")
            made[name] = task, folder, export.export_student(folder.parent / "student", folder, runs=3)
        return made[name]

    return make


def session(folder):
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def answer(ready, batch):
    names = [entry.name for entry in ready.get_inputs()]
    return torch.from_numpy(ready.run(["logits"], {name: batch[name].numpy() for name in names})[0])


@pytest.mark.parametrize("name", TASKS)
class TestParity:
    def test_any_number_of_rows_and_any_length_gives_the_students_logits(self, name, exported):
        task, folder, _ = exported(name)
        ready = session(folder / "onnx")
        for rows in (1, 2, 5):
            batch = {key: value for key, value in task.collate(task.rows[:rows]).items() if key != "labels"}
            with torch.no_grad():
                expected = task.student.eval()(**batch).logits
            torch.testing.assert_close(answer(ready, batch), expected, rtol=1e-4, atol=1e-5)

    def test_the_figures_are_those_of_the_files(self, name, exported):
        task, folder, figures = exported(name)
        inputs = export.made_up_inputs(task.student)
        for kind, figure in figures.items():
            assert figure.folder == folder / kind
            ready, differences, same = session(figure.folder), [], []
            for batch in inputs:
                with torch.no_grad():
                    theirs = task.student.eval()(**batch).logits
                ours = answer(ready, batch)
                differences.append((ours - theirs).abs().max().item())
                same += (ours.argmax(-1) == theirs.argmax(-1)).flatten().tolist()
            assert figure.max_difference == pytest.approx(max(differences), rel=0.2, abs=1e-6)
            assert figure.agreement == pytest.approx(sum(same) / len(same), abs=0.02)
            size = sum(path.stat().st_size for path in figure.folder.iterdir() if path.name.startswith("model.onnx"))
            assert figure.megabytes == pytest.approx(size / 1e6)
            assert figure.p50_ms > 0
            assert figure.student_p50_ms > 0

    def test_int8_has_int8_weights(self, name, exported):
        _, _, figures = exported(name)
        weights = {kind: (figure.folder / "model.onnx.data").stat().st_size for kind, figure in figures.items()}
        assert weights["int8"] < 0.6 * weights["onnx"]
        assert figures["int8"].max_difference > figures["onnx"].max_difference


class TestFolder:
    def test_transformers_loads_it(self, exported):
        from transformers.exporters import ExportedModel

        task, folder, _ = exported("single_label")
        batch = {key: value for key, value in task.collate(task.rows[:3]).items() if key != "labels"}
        with torch.no_grad():
            expected = task.student.eval()(**batch).logits
        got = ExportedModel.from_pretrained(folder / "onnx", device="cpu")(**batch).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_it_has_label_names_and_the_tokenizers_files(self, exported):
        _, folder, figures = exported("single_label")
        for kind in figures:
            assert json.loads((folder / kind / "config.json").read_text())["id2label"]["0"] == "a"
            assert (folder / kind / "tokenizer.json").is_file()
        assert {path.name for path in folder.iterdir()} == {"onnx", "int8"}

    def test_what_is_there_stays_unless_it_may_go(self, exported):
        task, folder, _ = exported("single_label")
        with pytest.raises(ValueError, match=r"exists already.*overwrite=True"):
            export.export_student(task.student, folder)

    def test_a_failure_leaves_what_was_there(self, tmp_path, monkeypatch):
        def fail(*args):
            raise OSError("no space left on device")

        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").touch()
        monkeypatch.setattr(export, "_write", fail)
        with pytest.raises(OSError, match="no space"):
            export.export_student(tiny_task("single_label").student, tmp_path / "out", overwrite=True)
        with pytest.raises(OSError, match="no space"):
            export.export_student(tiny_task("single_label").student, tmp_path / "new" / "out")
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/old"]


class TestRefusals:
    def refused(self, student, match, error=ValueError, **kwargs):
        with pytest.raises(error, match=match):
            export.export_student(student, kwargs.pop("output_dir", "nowhere/out"), **kwargs)
        assert not Path("nowhere").exists()

    def test_what_cannot_be_exported(self, tmp_path):
        self.refused(tiny_task("causal_lm").student, "token by token.*export_for_generation")
        self.refused(torch.nn.Linear(2, 2), "takes a Transformers model.*Linear")
        self.refused(str(tmp_path), "holds no config.json")
        self.refused(tiny_task("single_label").student.to("meta"), "meta device")
        t5 = hf.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=9)
        self.refused(hf.T5ForConditionalGeneration(t5), "encoder-decoder")

    def test_numbers_and_inputs(self):
        student = tiny_task("single_label").student
        self.refused(student, "runs=0", runs=0)
        self.refused(student, "at least one batch", inputs=[])
        self.refused(student, "at least one batch", inputs=[{"labels": torch.zeros(2)}])

    def test_a_tracers_failure_is_told_in_one_line(self):
        class Branching(hf.BertForSequenceClassification):
            def forward(self, input_ids=None, attention_mask=None):
                if input_ids.float().mean() > 1e6:  # on values, which a graph cannot
                    return None
                return super().forward(input_ids, attention_mask)

        self.refused(Branching(tiny_task("single_label").student.config), "Branching cannot be exported to ONNX: ")

    def test_a_wrong_answer_is_no_export(self, exported, monkeypatch, tmp_path):
        task, folder, _ = exported("single_label")
        student, right = task.student, exported_files.session

        def copied(model, batches, whole, int8):
            shutil.copytree(folder, whole)
            return ["onnx"]

        monkeypatch.setattr(export, "_write", copied)

        def wrong(path, threads):
            run = right(path, threads)
            return lambda batch: [logits + float("nan") for logits in run(batch)]

        monkeypatch.setattr(exported_files, "session", wrong)
        self.refused(student, "answers otherwise than the student", output_dir=tmp_path / "out", runs=1)
        assert not list(tmp_path.iterdir())


def test_a_missing_package_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxruntime and onnxscript: pip install 'hf_distill\[export\]'"):
        export.export_student(tiny_task("single_label").student, "out")


def test_the_student_stays_as_it_is(exported):
    task, _, _ = exported("single_label")
    student = task.student.train().bfloat16()
    ready = export._ready(student)
    assert student.training
    assert student.dtype == torch.bfloat16
    assert (ready.training, ready.dtype) == (False, torch.float32)
    task.student.float()
