"""What reaches the Hub: the real client in a process of its own, against a Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from card_schema import problems
from hub_server import running_hub

from hf_distill.testing import tiny_task

TESTS = Path(__file__).parent
TOKEN = "hf_" + "aVeryFakeToken" * 2
STUDENT = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The Hub after the session, what the session said last, all that it printed, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("session")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with running_hub(token=TOKEN) as hub:
        own = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }  # fmt: skip
        command = [sys.executable, str(TESTS / "hub_session.py")]
        done = subprocess.run(command, env=inherited | own, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return hub, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr, folder


def folders(repo):
    return {Path(path).parts[0] for path in repo.files if "/" in path}


class TestPushing:
    def test_a_student_arrives_with_its_card_and_nothing_of_the_training(self, session):
        hub, _, _, folder = session
        files = hub.repos["me/student"].files
        assert set(files) == STUDENT | {"training_args.bin"}
        assert files["model.safetensors"] == (folder / "ended" / "model.safetensors").read_bytes()
        assert b"Teacher: `someone/teacher`" in files["README.md"]

    def test_private_is_private(self, session):
        hub = session[0]
        assert {name: repo.private for name, repo in hub.repos.items()} == {
            "me/student": True, "me/every_save": False, "me/checkpoint": False, "me/all_checkpoints": False,
        }  # fmt: skip

    def test_hub_strategy_decides_what_is_pushed_while_training(self, session):
        repos = session[0].repos
        assert repos["me/student"].messages == ["End of training", "once more"]
        assert folders(repos["me/every_save"]) == set()
        *saves, last = repos["me/every_save"].messages
        assert last == "End of training"
        # Trainer pushes beside the training: on a busy machine one save may overtake another.
        assert saves
        assert set(saves) <= {"Training in progress, step 2", "Training in progress, step 4"}
        assert folders(repos["me/checkpoint"]) == {"last-checkpoint"}
        assert folders(repos["me/all_checkpoints"]) == {"checkpoint-2", "checkpoint-4"}
        assert "checkpoint-4/distillation_losses.safetensors" in repos["me/all_checkpoints"].files

    def test_the_losses_own_weights_stay_out_of_the_student(self, session):
        assert not [path for path in session[0].repos["me/every_save"].files if "distillation" in path]

    def test_a_tag_keeps_what_was_there(self, session):
        _, said, _, _ = session
        assert (said["tagged"], said["latest"]) == (None, "mit")

    def test_every_card_is_what_the_hub_takes(self, session):
        for repo in session[0].repos.values():
            header = yaml.safe_load(repo.files["README.md"].decode().split("---\n")[1])
            assert problems(header) == []
            assert {"hf_distill", "knowledge-distillation", "words"} <= set(header["tags"])
            (metric,) = header["model-index"][0]["results"][0]["metrics"]
            assert metric["type"] == "accuracy"


class TestLoadingBack:
    def test_the_student_is_the_one_that_was_pushed(self, session):
        assert session[1]["distance"] == 0.0

    def test_it_runs_in_a_pipeline(self, session):
        _, said, _, _ = session
        assert {answer["label"] for answer in said["pipeline"]} <= {"a", "b", "c"}
        assert [answer["score"] for answer in said["pipeline"]] == pytest.approx(said["answers"], abs=1e-5)

    def test_the_cards_own_code_runs(self, session):
        _, said, _, _ = session
        assert 'model="me/student"' in said["usage"]
        assert len(said["usage"].strip().splitlines()) <= 5
        assert said["used"][0]["label"] in {"a", "b", "c"}


class TestTokens:
    def test_no_token_is_printed(self, session):
        printed = session[2]
        assert "<HUB_TOKEN>" in printed  # the arguments were
        assert TOKEN not in printed

    def test_no_token_is_in_any_file_here_or_on_the_hub(self, session):
        hub, _, _, folder = session
        local = [path for path in folder.rglob("*") if path.is_file()]
        assert len([path for path in local if path.name == "training_args.bin"]) >= 8
        assert not [path for path in local if TOKEN.encode() in path.read_bytes()]
        pushed = {(name, path): data for name, repo in hub.repos.items() for path, data in repo.files.items()}
        assert not [place for place, data in pushed.items() if TOKEN.encode() in data]
        assert not [request for request in hub.requests if TOKEN in request]

    def test_saved_arguments_are_arguments(self, session):
        saved = torch.load(session[3] / "ended" / "training_args.bin", weights_only=False)
        assert type(saved).__name__ == "DistillationTrainingArguments"
        assert (saved.hub_token, saved.teacher_model_init_kwargs, saved.max_steps) == (None, {}, 4)


def test_no_code_of_strangers_runs_without_consent(make_trainer, monkeypatch):
    seen = []
    task = tiny_task("single_label")

    def from_pretrained(name, **kwargs):
        seen.append(kwargs)
        return task.teacher, {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    make_trainer(task, teacher_model="stranger/model", teacher_model_revision="abc")
    make_trainer(task, teacher_model="stranger/model", teacher_model_init_kwargs={"trust_remote_code": True})
    assert [kwargs["trust_remote_code"] for kwargs in seen] == [False, True]
    assert [kwargs["revision"] for kwargs in seen] == ["abc", "main"]
