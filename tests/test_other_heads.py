"""Heads that `tiny_task` has no models for: multiple choice and audio classification."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from parity import different_tensors
from test_vocabulary import original
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForMultipleChoice,
    BertTokenizerFast,
    CanineConfig,
    CanineForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_distill import DistillationTrainer
from hf_distill.testing import tiny_task

SIZES = {
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def multiple_choice(layers, width, **entries):
    config = BertConfig(
        vocab_size=37, max_position_embeddings=32, hidden_size=width, num_hidden_layers=layers, **SIZES, **entries
    )
    return BertForMultipleChoice(config)


def audio(layers, width):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
    return ASTForAudioClassification(
        ASTConfig(hidden_size=width, num_hidden_layers=layers, **patches, **labels, **SIZES)
    )


def whisper(layers, width):
    """The encoder alone, of a config that says encoder-decoder."""
    parts = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", layers), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    audio_of = {"num_mel_bins": 8, "max_source_positions": 10, "dropout": 0.0}
    tokens = {"vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(d_model=width, num_labels=3, classifier_proj_size=8, **parts, **audio_of, **tokens)
    return WhisperForAudioClassification(config)


def video(layers, width):
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_frames": 4, "tubelet_size": 2}
    return VideoMAEForVideoClassification(
        VideoMAEConfig(hidden_size=width, num_hidden_layers=layers, num_labels=3, **sizes, **SIZES)
    )


def windows(layers, width):
    """Attention within windows, of which a row has several."""
    config = SwinConfig(
        image_size=16, patch_size=2, num_channels=1, window_size=4, embed_dim=width, depths=[layers], num_heads=[2],
        num_labels=3, hidden_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return SwinForImageClassification(config)


def row(build, index):
    if build in (video, windows):
        frames = (4, 1, 8, 8) if build is video else (1, 16, 16)
        return {"pixel_values": torch.randn(frames), "labels": index % 3}
    if build is whisper:
        return {"input_features": torch.randn(8, 20), "labels": index % 3}
    if build is audio:
        return {"input_values": torch.randn(32, 16), "labels": index % 3}
    lengths = (6, 4, 3)  # three choices, each padded to six tokens
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    return {"input_ids": torch.randint(5, 37, (3, 6)) * mask, "attention_mask": mask, "labels": index % 3}


def stacked(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def test_one_choice_is_right_however_many_classes_the_config_counts(make_args):
    torch.manual_seed(0)
    student, teacher = multiple_choice(2, 16, num_labels=1), multiple_choice(2, 24, num_labels=1)
    rows = [row(multiple_choice, index) for index in range(8)]
    trainer = DistillationTrainer(student, make_args(), stacked, rows, rows, teacher_model=teacher)
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(student(**stacked(rows)).loss.item(), rel=1e-5)


def test_the_card_of_a_multiple_choice_student_shows_a_call_that_runs(make_args, tmp_path, monkeypatch):
    student = multiple_choice(1, 16, name_or_path="")
    rows = [row(multiple_choice, index) for index in range(8)]
    trainer = DistillationTrainer(
        student, make_args(max_steps=1), stacked, rows, teacher_model=multiple_choice(1, 16),
        processing_class=original("wordpiece"),
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "AutoModelForMultipleChoice" in code
    tokens = BertTokenizerFast(
        vocab={token: k for k, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    )
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: tokens)
    monkeypatch.setattr("transformers.AutoModelForMultipleChoice.from_pretrained", lambda name: student.cpu().eval())
    said = []
    exec(code, {"print": said.append})
    assert said[0].logits.shape == (1, 2)


@pytest.mark.parametrize("build", [multiple_choice, audio, whisper, video, windows])
def test_eval_loss_is_the_models_own_and_accumulation_changes_nothing(build, make_args):
    weights = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        student, teacher = build(2, 16), build(4, 24)
        rows = [row(build, index) for index in range(16)]
        args = make_args(
            hidden_state_weight=1.0, attention_weight=1.0, max_steps=3, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer = DistillationTrainer(student, args, stacked, rows, rows, teacher_model=teacher)
        metrics = trainer.evaluate()
        with torch.no_grad():
            assert metrics["eval_loss"] == pytest.approx(student(**stacked(rows)).loss.item(), rel=1e-5)
        assert metrics["eval_hidden_loss"] > 0
        assert metrics["eval_soft_loss"] > 0
        trainer.train()
        weights.append({**trainer.model.state_dict(), **trainer.losses.state_dict()})
    assert different_tensors(weights[1], weights[0]) == []


def test_attention_maps_of_windows_are_averaged_over_rows(make_args):
    torch.manual_seed(0)
    student, teacher = (windows(2, width).eval() for width in (16, 24))
    rows = [row(windows, index) for index in range(6)]
    args = make_args(attention_weight=1.0, layer_mapping={1: 1}, soft_target_weight=0.0, hard_label_weight=0.0)
    trainer = DistillationTrainer(student, args, stacked, rows, rows, teacher_model=teacher)
    pixels = stacked(rows)["pixel_values"]
    with torch.no_grad():
        maps = [model(pixels, output_attentions=True).attentions[0].double() for model in (student, teacher)]
    assert maps[0].shape == (6 * 4, 2, 16, 16)
    assert trainer.evaluate()["eval_attention_loss"] == pytest.approx((maps[0] - maps[1]).square().mean().item())


def test_a_student_whose_forward_takes_no_labels_learns_from_them(make_args):
    sizes = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    student, teacher = (DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes, num_labels=3)) for _ in range(2))
    rows = Dataset.from_list([{"pixel_values": torch.randn(1, 8, 8).tolist(), "label": k % 3} for k in range(8)])
    metrics = lambda answer: {"labelled": int((answer.label_ids >= 0).sum())}  # noqa: E731
    trainer = DistillationTrainer(
        student, make_args(max_steps=2), train_dataset=rows, eval_dataset=rows, teacher_model=teacher,
        compute_metrics=metrics,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    with torch.no_grad():
        logits = student.eval()(torch.tensor(rows["pixel_values"][:])).logits
    assert found["eval_labelled"] == 8
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["label"][:])).item()
    assert found["eval_hard_loss"] == pytest.approx(expected, rel=1e-5)


def test_characters_without_a_table_of_tokens_can_be_distilled(make_args):
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32, "num_hash_buckets": 16}
    sizes |= {"local_transformer_stride": 8, "downsampling_rate": 2}
    student, teacher = (CanineForSequenceClassification(CanineConfig(**sizes)) for _ in range(2))
    rows = [
        {"input_ids": torch.randint(5, 90, (16,)), "attention_mask": torch.ones(16).long(), "labels": k % 2}
        for k in range(8)
    ]
    trainer = DistillationTrainer(student, make_args(max_steps=2), stacked, rows, rows, teacher_model=teacher)
    trainer.train()
    with torch.no_grad():
        expected = student.eval()(**stacked(rows)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_module_without_a_config_is_told_what_to_be(make_args):
    class Own(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    rows = [row(multiple_choice, index) for index in range(2)]
    for student, teacher in ((Own(), multiple_choice(1, 16)), (multiple_choice(1, 16), Own())):
        with pytest.raises(ValueError, match="Own has no config, by which its task is known"):
            DistillationTrainer(student, make_args(), stacked, rows, teacher_model=teacher)


def test_an_answer_that_points_at_padding_is_none_however_the_batch_is_padded(make_trainer):
    """As those that a truncated context has: behind the row, which in a longer batch is padding."""
    found = []
    for extra in (0, 3):
        task = tiny_task("question_answering")
        row = dict(task.rows[0])
        row["start_positions"] = row["end_positions"] = len(row["input_ids"])
        task.rows, task.collate.extra = [row, dict(task.rows[1])], extra
        trainer = make_trainer(task, soft_target_weight=0.0, per_device_train_batch_size=2, max_steps=1)
        trainer.train()
        found.append(trainer.state.log_history[-1]["train_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0] < 20  # padding is masked by -10,000


def test_one_class_for_all_tokens_is_refused(make_trainer):
    task = tiny_task("token")
    for model in (task.student, task.teacher):
        model.config.id2label, model.config.label2id = {0: "x"}, {"x": 0}
        model.num_labels = model.config.num_labels
        model.classifier = torch.nn.Linear(model.classifier.in_features, 1)
    for row in task.rows:
        row["labels"] = [min(label, 0) for label in row["labels"]]
    with pytest.raises(ValueError, match="one class for all tokens"):
        make_trainer(task).train()
