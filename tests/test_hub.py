"""What reaches the Hub, with the client's two calls replaced."""

from pathlib import Path

import pytest
import transformers.trainer

from hf_distill.testing import tiny_task


@pytest.mark.skipif(not hasattr(transformers.trainer, "hf_api"), reason="this release calls the client otherwise")
def test_push_to_hub_uploads_the_student_and_its_card(make_trainer, monkeypatch, tmp_path):
    uploaded = {}

    class Api:
        def create_repo(self, name, **kwargs):
            return type("RepoUrl", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, ignore_patterns, **kwargs):
            uploaded.update(repo_id=repo_id, folder=Path(folder_path), ignored=ignore_patterns)

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    trainer = make_trainer(
        tiny_task("single_label"), hidden_state_weight=1.0, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.push_to_hub()
    assert uploaded["repo_id"] == "me/out"
    files = {path.name for path in uploaded["folder"].iterdir() if path.is_file()}
    assert files == {"config.json", "model.safetensors", "README.md", "training_args.bin"}
    assert "checkpoint-*" in uploaded["ignored"]
    assert "## Distillation" in (uploaded["folder"] / "README.md").read_text()


def test_no_code_of_strangers_runs_without_consent(make_trainer, monkeypatch):
    seen = []
    task = tiny_task("single_label")

    def from_pretrained(name, **kwargs):
        seen.append(kwargs)
        return task.teacher

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    make_trainer(task, teacher_model="stranger/model", teacher_model_revision="abc")
    make_trainer(task, teacher_model="stranger/model", teacher_model_init_kwargs={"trust_remote_code": True})
    assert [kwargs["trust_remote_code"] for kwargs in seen] == [False, True]
    assert [kwargs["revision"] for kwargs in seen] == ["abc", "main"]
