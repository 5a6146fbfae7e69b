"""Weights and temperatures that change while training."""

import math

import pytest
import torch
from parity import different_tensors
from transformers import TrainerCallback

from hf_distill import Schedule
from hf_distill.losses import ContrastiveLoss, HardLabelLoss, HiddenStateLoss, SoftTargetLoss
from hf_distill.schedules import Moment
from hf_distill.testing import tiny_task


def scheduled():
    return {
        "soft": SoftTargetLoss(temperature=Schedule.linear(4.0, 1.0), weight=Schedule.cosine(1.0, 0.2)),
        "hard": HardLabelLoss(weight=Schedule.stages({0: 0.0, 1: 0.5})),
        "hidden": HiddenStateLoss(weight=Schedule.linear(1.0, 0.0, until=0.5)),
    }


def remembered(trainer):
    """What the numbers were when each step was computed."""
    seen, losses = [], trainer.losses

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(
                (losses["soft"].temperature, losses["soft"].weight, losses["hard"].weight, losses["hidden"].weight)
            )

    trainer.add_callback(Watch())
    return seen


def expected(step, steps=6, per_epoch=3):
    progress = step / (steps - 1)
    return (
        4.0 - 3.0 * progress,
        0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2,
        0.0 if step < per_epoch else 0.5,
        max(0.0, 1.0 - progress / 0.5),
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_has_the_numbers_of_its_moment(accumulation, make_trainer):
    trainer = make_trainer(
        task=tiny_task("single_label"), losses=scheduled(), num_train_epochs=2,
        per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    seen = remembered(trainer)
    trainer.train()
    assert seen == [pytest.approx(expected(step)) for step in range(6)]


def test_a_run_with_schedules_is_one_with_the_numbers_set_by_hand(make_trainer):
    trainer = make_trainer(task=tiny_task("single_label"), losses=scheduled(), num_train_epochs=2)
    trainer.train()
    fixed = {"soft": SoftTargetLoss(), "hard": HardLabelLoss(), "hidden": HiddenStateLoss()}
    by_hand = make_trainer(task=tiny_task("single_label"), losses=fixed, num_train_epochs=2)

    class ByHand(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            temperature, soft, hard, hidden = expected(state.global_step)
            fixed["soft"].temperature = temperature
            fixed["soft"].weight, fixed["hard"].weight, fixed["hidden"].weight = soft, hard, hidden

    by_hand.add_callback(ByHand())
    by_hand.train()
    assert not different_tensors(trainer.model.state_dict(), by_hand.model.state_dict())


def test_a_resumed_run_goes_on_where_the_schedule_was(make_trainer, tmp_path):
    def trainer(**kwargs):
        return make_trainer(
            task=tiny_task("single_label"), losses=scheduled(), num_train_epochs=2, save_strategy="steps",
            save_steps=2, output_dir=str(tmp_path / "run"), **kwargs,
        )  # fmt: skip

    straight = trainer()
    straight.train()
    resumed = trainer()
    seen = remembered(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert seen == [pytest.approx(expected(step)) for step in (4, 5)]
    assert not different_tensors(straight.model.state_dict(), resumed.model.state_dict())


def test_the_equation_tells_the_schedule(make_trainer):
    equation = make_trainer(task=tiny_task("single_label"), losses=scheduled()).losses.equation()
    assert "(cosine 1 to 0.2) * soft[forward_kl, T=linear 4 to 1]" in equation
    assert "(0 from epoch 0, 0.5 from epoch 1) * hard" in equation
    assert "(linear 1 to 0 until 0.5) * hidden" in equation


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_between_start_and_end(kind):
    schedule = getattr(Schedule, kind)(3.0, 1.0, until=0.8)
    values = [schedule(Moment(progress=share)) for share in torch.linspace(0, 1, 101).tolist()]
    assert values[0] == 3.0
    assert values[80:] == pytest.approx([1.0] * 21)
    assert values[40] == pytest.approx(2.0)
    assert sorted(values, reverse=True) == values


def test_the_temperature_of_contrasts_may_change_too():
    loss = ContrastiveLoss(temperature=Schedule.linear(0.2, 0.1))
    loss.at(Moment(progress=0.5))
    assert loss.temperature == pytest.approx(0.15)
    assert "0.2" in loss.formula()
    assert "0.1" in loss.formula()


@pytest.mark.parametrize(
    "build",
    [
        lambda: SoftTargetLoss(temperature=Schedule.linear(1.0, 0.0)),
        lambda: SoftTargetLoss(weight=Schedule.linear(1.0, -1.0)),
        lambda: SoftTargetLoss(temperature="2"),
        lambda: SoftTargetLoss(temperature=None),
        lambda: ContrastiveLoss(temperature=Schedule.linear(0.1, -0.1)),
        lambda: Schedule.linear(1.0, 0.0, until=0.0),
        lambda: Schedule.stages({1: 1.0}),
    ],
)
def test_what_makes_no_sense_at_some_moment_is_refused(build):
    with pytest.raises(ValueError, match=r"above 0|at least 0|epoch 0"):
        build()
