"""Heads that `tiny_task` has no models for: multiple choice and audio classification."""

import pytest
import torch
from parity import different_tensors
from transformers import ASTConfig, ASTForAudioClassification, BertConfig, BertForMultipleChoice

from hf_distill import DistillationTrainer

SIZES = {
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def multiple_choice(layers, width):
    config = BertConfig(
        vocab_size=37, max_position_embeddings=32, hidden_size=width, num_hidden_layers=layers, **SIZES
    )
    return BertForMultipleChoice(config)


def audio(layers, width):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
    return ASTForAudioClassification(
        ASTConfig(hidden_size=width, num_hidden_layers=layers, **patches, **labels, **SIZES)
    )


def row(build, index):
    if build is audio:
        return {"input_values": torch.randn(32, 16), "labels": index % 3}
    lengths = (6, 4, 3)  # three choices, each padded to six tokens
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    return {"input_ids": torch.randint(5, 37, (3, 6)) * mask, "attention_mask": mask, "labels": index % 3}


def stacked(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("build", [multiple_choice, audio])
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
