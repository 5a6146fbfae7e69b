"""Each term's share of the gradient."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, default_data_collator

from hf_distill.losses import HardLabelLoss, HiddenStateLoss, LELPLoss, SoftTargetLoss
from hf_distill.reports.gradients import gradient_shares
from hf_distill.testing import tiny_task


def vector(model):
    """The gradient that a backward pass has left."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["token", "causal_lm"])
def test_shares_are_those_of_backward_passes_one_term_at_a_time(name, make_trainer):
    """Beside trainers that each have one of the terms."""
    builders = {
        "soft": lambda: SoftTargetLoss(temperature=3.0, weight=0.7),
        "hard": lambda: HardLabelLoss(weight=2.0),
        "hidden": lambda: HiddenStateLoss(weight=0.1),
    }
    options = {"per_device_train_batch_size": 48, "max_steps": 1}
    found = gradient_shares(
        make_trainer(task=tiny_task(name), losses={term: build() for term, build in builders.items()}, **options),
        batches=1,
    )
    alone = {}
    for term, build in builders.items():
        task = tiny_task(name)
        trainer = make_trainer(task=task, losses={term: build()}, **options)
        trainer.compute_loss(task.student.train(), task.collate(task.rows)).backward()
        alone[term] = vector(task.student)
    whole = sum(alone.values())
    total = sum(gradient.norm() for gradient in alone.values())
    for term in ("soft", "hard", "hidden"):
        expected = alone[term]
        assert found[term].norm == pytest.approx(float(expected.norm()), rel=1e-4)
        assert found[term].share == pytest.approx(float(expected.norm() / total), rel=1e-4)
        cosine = float(expected @ whole / expected.norm() / whole.norm())
        assert found[term].cosine == pytest.approx(cosine, abs=1e-4)


def test_nothing_is_changed(make_trainer):
    task = tiny_task("single_label")
    trainer = make_trainer(task=task)
    before, state = {k: v.clone() for k, v in task.student.state_dict().items()}, torch.get_rng_state()
    task.student.train()
    gradient_shares(trainer)
    assert task.student.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in task.student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in task.student.state_dict().items())


def test_running_means_stay_as_they_are(make_trainer):
    task = tiny_task("image")
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    rows = [{"pixel_values": torch.randn(1, 16, 16) + 2, "labels": k % 2} for k in range(8)]
    models = {name: ResNetForImageClassification(config) for name in ("model", "teacher_model")}
    trainer = make_trainer(task, **models, train_dataset=rows, data_collator=default_data_collator)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    gradient_shares(trainer)
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_a_loss_that_learns_from_rows_has_learned(make_trainer):
    """So its share is that with which training starts, and an evaluation before says nothing of it."""
    task = tiny_task("single_label")
    trainer = make_trainer(task, losses={"lelp": LELPLoss(fit_rows=16), "hard": HardLabelLoss()})
    assert "eval_lelp_loss" not in trainer.evaluate(task.rows)
    gradient_shares(trainer)
    assert trainer.losses["lelp"].directions.norm() > 0
    assert trainer.evaluate(task.rows)["eval_lelp_loss"] > 0


def test_without_training_data_there_is_nothing_to_measure(make_trainer):
    trainer = make_trainer(task=tiny_task("single_label"), train_dataset=None)
    with pytest.raises(ValueError, match="needs a train_dataset"):
        gradient_shares(trainer)
