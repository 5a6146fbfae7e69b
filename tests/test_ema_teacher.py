"""The student as its own teacher: an average of its weights that follows it."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from parity import different_tensors
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_distill.losses import HardLabelLoss, SoftTargetLoss
from hf_distill.teachers import EMATeacher
from hf_distill.teachers.ema import EMA_NAME
from hf_distill.testing import tiny_task

LEARNING = {"learning_rate": 0.5, "per_device_train_batch_size": 4}


def following(make_trainer, name="single_label", decay=0.7, task=None, **settings):
    task = task or tiny_task(name)
    losses = {"hard": HardLabelLoss(), "soft": SoftTargetLoss()}
    return make_trainer(task, teacher_model=EMATeacher(decay), losses=losses, **{**LEARNING, **settings})


class Weights(TrainerCallback):
    """The student's weights after each optimizer step."""

    def __init__(self):
        self.steps, self.substeps = [], 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: value.detach().clone() for name, value in model.named_parameters()})

    def on_substep_end(self, *args, **kwargs):
        self.substeps += 1


def average(trainer):
    return {name: value.clone() for name, value in trainer.teacher.model.named_parameters()}


@pytest.mark.parametrize("name", ["single_label", "masked_lm"])  # the second ties weights
def test_it_averages_the_students_weights_once_a_step(name, make_trainer):
    watch = Weights()
    trainer = following(make_trainer, name, max_steps=4, gradient_accumulation_steps=2, callbacks=[watch])
    expected = average(trainer)
    assert different_tensors(expected, dict(trainer.model.named_parameters()), 0.0) == []
    trainer.train()
    assert (len(watch.steps), watch.substeps) == (4, 4)
    for step in watch.steps:
        expected = {key: 0.7 * value + 0.3 * step[key] for key, value in expected.items()}
    assert different_tensors(average(trainer), expected, 1e-6) == []
    assert different_tensors(average(trainer), dict(trainer.model.named_parameters()))


def test_without_memory_it_is_the_student(make_trainer):
    trainer = following(make_trainer, decay=0.0, max_steps=2)
    trainer.train()
    assert different_tensors(average(trainer), dict(trainer.model.named_parameters()), 0.0) == []


def test_it_is_no_part_of_the_student(make_trainer, tmp_path):
    trainer = following(make_trainer, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    ours = {id(p) for p in trainer.model.parameters()}
    theirs = list(trainer.teacher.model.parameters())
    assert not any(id(p) in ours or p.requires_grad for p in theirs)
    assert not any(module.training for module in trainer.teacher.model.modules())
    folder = tmp_path / "out" / "checkpoint-2"
    assert set(load_file(folder / "model.safetensors")) == set(trainer.model.state_dict())
    stored = load_file(folder / EMA_NAME)
    assert different_tensors({k: stored[k] for k in average(trainer)}, average(trainer), 0.0) == []


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    straight = following(make_trainer, output_dir=str(tmp_path / "a"), **settings)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    task = tiny_task("single_label")
    task.student = tiny_task("single_label", seed=1).student
    resumed = following(make_trainer, task=task, output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert different_tensors(average(resumed), average(straight), 0.0) == []
    assert different_tensors(dict(resumed.model.state_dict()), dict(straight.model.state_dict()), 0.0) == []
    (tmp_path / "b" / "checkpoint-6" / EMA_NAME).unlink()
    with pytest.raises(ValueError, match=f"has no {EMA_NAME}"):
        following(make_trainer, output_dir=str(tmp_path / "b"), **{**settings, "max_steps": 8}).train(
            resume_from_checkpoint=True
        )


def test_the_best_model_comes_back_with_its_teacher(make_trainer):
    task = tiny_task("single_label")
    trainer = following(
        make_trainer, task=task, eval_dataset=task.rows[:12], max_steps=4, learning_rate=2.0, max_grad_norm=0.0,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4", "the test needs a run whose last step is not its best"
    stored = load_file(best / EMA_NAME)
    assert different_tensors(average(trainer), {k: stored[k] for k in average(trainer)}, 0.0) == []


def test_it_follows_a_new_student_from_its_start(make_trainer):
    task, results = tiny_task("single_label"), []
    fresh = copy.deepcopy(task.student)
    trainer = following(make_trainer, task=task, model_init=lambda: copy.deepcopy(fresh), max_steps=2)
    for _ in range(2):
        trainer.train()
        results.append(average(trainer))
    assert different_tensors(*results, 0.0) == []


def test_rows_without_labels_learn_from_it(make_trainer):
    """One micro-batch pulls the student back to where the average still is."""
    task = tiny_task("single_label")
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in task.rows]
    trainer = make_trainer(
        task, teacher_model=EMATeacher(0.9), losses={"soft": SoftTargetLoss()}, train_dataset=rows, max_steps=1,
        learning_rate=0.5,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    distance = lambda: trainer.evaluate(rows)["eval_soft_loss"]  # noqa: E731
    before = distance()
    trainer.train()
    assert 0 < distance() < before


def test_what_cannot_be_is_refused(make_trainer, tmp_path):
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must lie in"):
            EMATeacher(decay)
    with pytest.raises(ValueError, match="changes with every step, so its answers cannot be cached"):
        following(make_trainer, teacher_cache_dir=str(tmp_path / "cache"))
    task = tiny_task("single_label")
    with pytest.raises(ValueError, match="cannot be one of several teachers"):
        make_trainer(task, teacher_model=[task.teacher, EMATeacher()])


def test_the_average_of_short_weights_is_a_long_one(make_trainer):
    """In bf16 most steps of a thousandth of the way are rounded away."""
    watch, task = Weights(), tiny_task("single_label")
    task.student.to(torch.bfloat16)
    trainer = following(make_trainer, task=task, decay=0.999, num_train_epochs=5, callbacks=[watch])
    expected = {name: value.double() for name, value in task.student.named_parameters()}
    trainer.train()
    for step in watch.steps:
        expected = {key: 0.999 * value + 0.001 * step[key].double() for key, value in expected.items()}
    found = average(trainer)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert different_tensors(found, expected) == []
    assert {value.dtype for value in task.student.parameters()} == {torch.bfloat16}
