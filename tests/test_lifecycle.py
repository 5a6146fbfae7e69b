"""Saving, resuming, evaluating, and everything around the steps that Trainer's users rely on."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from parity import different_tensors, record_gradients
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillationTrainer
from hf_distill.losses import HiddenStateLoss, SoftTargetLoss
from hf_distill.testing import tiny_task
from hf_distill.wrapped_forward import LOSSES_NAME

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
PROJECTED = {"hidden_state_weight": 1.0, "layer_mapping": "uniform"}  # widths differ: there are projections


def state(trainer):
    return {key: value.clone() for key, value in {**trainer.model.state_dict(), **trainer.losses.state_dict()}.items()}


def with_dropout(task):
    for module in task.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return task


def test_projection_gradients_are_fresh_each_step(make_trainer):
    """Outside the model they would pile up: Trainer clears the model's gradients only."""
    task = tiny_task("single_label", rows=16)
    trainer = make_trainer(task, **PROJECTED, learning_rate=0.0, max_steps=5)
    gradients = record_gradients(trainer)
    trainer.train()
    norms = [
        torch.stack([g.norm() for name, g in step.items() if name.startswith("distillation_losses")]).norm().item()
        for step in gradients
    ]
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-5)
    assert norms[0] > 0


def test_projections_are_clipped_with_the_student(make_trainer):
    """SGD moves everything together by at most learning rate x max_grad_norm."""
    trainer = make_trainer(tiny_task("single_label"), **PROJECTED, max_steps=1, max_grad_norm=0.01, learning_rate=1.0)
    before = state(trainer)
    trainer.train()
    moved = torch.stack([(value - before[key]).float().norm() for key, value in state(trainer).items()]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path):
    settings = {
        **PROJECTED, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch",
        "lr_scheduler_type": "linear", "learning_rate": 1e-2, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "logging_strategy": "steps", "logging_steps": 1,
    }  # fmt: skip
    straight = make_trainer(with_dropout(tiny_task("token")), **settings, output_dir=str(tmp_path / "a"))
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = make_trainer(with_dropout(tiny_task("token", seed=1)), **settings, output_dir=str(tmp_path / "b"))
    resumed.train_dataset, resumed.teacher = straight.train_dataset, straight.teacher  # only the student starts anew
    resumed.train(resume_from_checkpoint=True)
    assert different_tensors(state(resumed), state(straight), 0.0) == []
    for ours, theirs in zip(resumed.state.log_history, straight.state.log_history, strict=True):
        assert {k: v for k, v in ours.items() if k.endswith("_loss") and k != "train_loss"} == {
            k: v for k, v in theirs.items() if k.endswith("_loss") and k != "train_loss"
        }


def test_a_checkpoint_without_the_losses_parameters_is_refused(make_trainer, tmp_path):
    settings = {**PROJECTED, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tiny_task("single_label"), **settings).train()
    (tmp_path / "out" / "checkpoint-2" / LOSSES_NAME).unlink()
    with pytest.raises(ValueError, match=f"has no {LOSSES_NAME}"):
        make_trainer(tiny_task("single_label"), **settings).train(resume_from_checkpoint=True)


def test_what_is_saved_equals_a_plain_students(make_trainer, make_args, tmp_path):
    ours = make_trainer(tiny_task("single_label"), **PROJECTED, max_steps=1, save_strategy="steps", save_steps=1)
    plain_task = tiny_task("single_label")
    plain = Trainer(
        plain_task.student,
        make_args(cls=TrainingArguments, output_dir=str(tmp_path / "plain"), max_steps=1),
        plain_task.collate,
        plain_task.rows,
    )
    for trainer in (ours, plain):
        trainer.train()
        trainer.save_model()
    folders = [tmp_path / "out", tmp_path / "out" / "checkpoint-1", tmp_path / "plain"]
    keys = [set(load_file(folder / "model.safetensors")) for folder in folders]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert keys[0] == keys[1] == keys[2]
    assert configs[0] == configs[1] == configs[2]
    assert not (tmp_path / "out" / LOSSES_NAME).exists()
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert different_tensors(loaded.state_dict(), ours.model.state_dict(), 0.0) == []


def test_the_student_is_left_as_it_was_found(make_trainer):
    trainer = make_trainer(tiny_task("single_label"), **PROJECTED, max_steps=1)
    keys = set(trainer.model.state_dict())
    trainer.train()
    assert set(trainer.model.state_dict()) == keys
    assert "forward" not in vars(trainer.model)
    assert copy.deepcopy(trainer.model).num_parameters() == trainer.model.num_parameters()


def test_the_teacher_stays_bit_for_bit_the_same(make_trainer, tmp_path):
    task = tiny_task("single_label")
    before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    modes = []

    class Watching(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            modes.append(any(module.training for module in task.teacher.modules()))

    task.teacher.train()
    trainer = make_trainer(
        task, **PROJECTED, callbacks=[Watching()], max_steps=3, gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    assert different_tensors(task.teacher.state_dict(), before, 0.0) == []
    assert modes
    assert not any(modes)
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert sum(value.numel() for value in saved.values()) == trainer.model.num_parameters()


def test_the_best_model_comes_back_with_its_projections(make_trainer):
    task = tiny_task("single_label")
    trainer = make_trainer(
        task, **PROJECTED, eval_dataset=task.rows[:12], max_steps=6, learning_rate=2.0, max_grad_norm=0.0,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_distillation_loss",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6", "the test needs a run whose last step is not its best"
    kept = {**load_file(best / "model.safetensors"), **load_file(best / LOSSES_NAME)}
    assert different_tensors({k: v for k, v in state(trainer).items() if k in kept}, kept, 0.0) == []
    assert trainer.evaluate()["eval_distillation_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_best_checkpoint_that_is_gone_does_not_end_a_finished_run(make_trainer):
    """Trainer warns and keeps the last; so does this, projections too."""

    class Removed(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    trainer = make_trainer(
        tiny_task("single_label"), **PROJECTED, eval_dataset=tiny_task("single_label").rows[:12], max_steps=2,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        callbacks=[Removed()],
    )  # fmt: skip
    assert trainer.train().global_step == 2


def test_model_init_starts_student_and_projections_afresh(make_trainer):
    task = tiny_task("single_label")
    fresh = copy.deepcopy(task.student)
    trainer = make_trainer(task, model_init=lambda: copy.deepcopy(fresh), **PROJECTED, max_steps=3)
    trainer.train()
    first = state(trainer)
    trainer.train()
    assert different_tensors(state(trainer), first, 0.0) == []
    single = make_trainer(tiny_task("single_label"), **PROJECTED, max_steps=3)
    single.train()
    assert different_tensors(state(single), first, 0.0) == []


def test_training_twice_goes_on_from_where_it_was(make_trainer):
    trainer = make_trainer(tiny_task("single_label"), **PROJECTED, max_steps=2)
    trainer.train()
    once = state(trainer)
    trainer.train()
    assert set(different_tensors(state(trainer), once)) & set(trainer.losses.state_dict())


@pytest.mark.parametrize("name", ["single_label", "causal_lm"])
def test_activation_checkpointing_changes_nothing(name, make_trainer):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_task(name), **PROJECTED, max_steps=2, **{CHECKPOINTING: checkpointing})
        trainer.train()
        results.append(state(trainer))
    assert different_tensors(results[1], results[0]) == []


def test_too_large_a_batch_is_halved_until_it_fits(make_trainer):
    class SmallDevice(DistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training and len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(tiny_task("single_label"), SmallDevice, **PROJECTED, max_steps=2, auto_find_batch_size=True)
    before = state(trainer)
    trainer.train()
    assert trainer.state.train_batch_size == 4
    assert set(different_tensors(state(trainer), before)) >= set(trainer.losses.state_dict())


def test_a_users_own_optimizer_trains_what_it_was_given(make_trainer):
    task = tiny_task("single_label")
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.1)
    trainer = make_trainer(task, optimizers=(optimizer, None), losses={"soft": SoftTargetLoss()}, max_steps=2)
    before = state(trainer)
    trainer.train()
    assert different_tensors(state(trainer), before)


def test_a_users_own_optimizer_without_the_projections_is_refused(make_trainer):
    task = tiny_task("single_label")
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.1)
    trainer = make_trainer(task, optimizers=(optimizer, None), losses={"hidden": HiddenStateLoss()}, max_steps=1)
    with pytest.raises(ValueError, match=r"optimizer.*projections.*add_param_group"):
        trainer.train()


def test_the_model_card_names_teacher_and_equation(make_trainer, tmp_path):
    task = tiny_task("single_label")
    task.teacher.config._name_or_path = "someone/large-teacher"
    trainer = make_trainer(task, temperature=4.0, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Teacher: `someone/large-teacher`" in card
    assert "1 * soft[forward_kl, T=4] + 0.5 * hard[task loss on labels]" in card
    assert "hinton2015distilling" in card
    assert "- knowledge-distillation" in card.split("---")[1]


def test_a_loss_computed_after_training_is_a_mean_of_its_own(make_trainer):
    task = tiny_task("single_label", rows=22)
    trainer = make_trainer(
        task, soft_target_weight=0.0, hard_label_weight=1.0, gradient_accumulation_steps=4,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    batch = task.collate(task.rows[:4])
    loss = trainer.compute_loss(task.student.train(), dict(batch))
    assert loss.item() == pytest.approx(task.student(**batch).loss.item(), rel=1e-6)
