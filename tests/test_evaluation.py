"""Evaluation, prediction and logs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from hf_distill.losses import HiddenStateLoss, SoftTargetLoss
from hf_distill.testing import TASKS, tiny_task

PROJECTED = {"hidden_state_weight": 1.0}


@pytest.mark.parametrize("name", TASKS)
def test_predict_returns_what_a_plain_trainer_returns(name, make_trainer, make_args):
    task = tiny_task(name, rows=10)
    small = {"per_device_eval_batch_size": 10}
    ours = make_trainer(task, **PROJECTED, **small).predict(task.rows)
    plain = Trainer(task.student, make_args(cls=TrainingArguments, **small), task.collate).predict(task.rows)
    as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    for mine, theirs in zip(as_tuple(ours.predictions), as_tuple(plain.predictions), strict=True):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(as_tuple(ours.label_ids), as_tuple(plain.label_ids), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert "test_hidden_loss" in ours.metrics


def test_metrics_see_plain_arrays(make_trainer):
    task = tiny_task("token", rows=10)
    seen = {}

    def metric(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"accuracy": 1.0}

    trainer = make_trainer(task, **PROJECTED, eval_dataset=task.rows, compute_metrics=metric)
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    assert seen["shapes"][0][:2] == seen["shapes"][1]


def test_prediction_without_labels(make_trainer):
    task = tiny_task("single_label", rows=10)
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in task.rows]
    output = make_trainer(task).predict(rows)
    assert output.predictions.shape == (10, 3)
    assert output.label_ids is None
    assert output.metrics["test_loss"] == pytest.approx(output.metrics["test_soft_loss"], rel=1e-5)


def test_prediction_with_neither_labels_nor_teacher_has_no_loss(make_trainer):
    task = tiny_task("single_label", rows=10)
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in task.rows]
    output = make_trainer(task, teacher_model=None, train_dataset=None).predict(rows)
    assert output.predictions.shape == (10, 3)
    assert "test_loss" not in output.metrics


def test_each_eval_term_is_the_mean_over_the_whole_set(make_trainer):
    """Ragged token rows in batches of 3: the mean over tokens, not a mean of batch means."""
    task = tiny_task("token", rows=10)
    trainer = make_trainer(task, temperature=2.0, eval_dataset=task.rows, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    with torch.no_grad():
        batch = task.collate(task.rows)
        labels = batch.pop("labels")
        student, teacher = task.student(**batch).logits[labels != -100], task.teacher(**batch).logits[labels != -100]
    soft = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") * 4
    hard = F.cross_entropy(student, labels[labels != -100])
    assert metrics["eval_soft_loss"] == pytest.approx(soft.item(), rel=1e-5)
    assert metrics["eval_hard_loss"] == pytest.approx(hard.item(), rel=1e-5)
    assert metrics["eval_distillation_loss"] == pytest.approx((soft + 0.5 * hard).item(), rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_train_logs_add_up_to_the_loss(accumulation, make_trainer):
    trainer = make_trainer(
        tiny_task("token"), **PROJECTED, max_steps=6, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4, logging_strategy="steps", logging_steps=3,
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] == pytest.approx(
            line["soft_loss"] + 0.5 * line["hard_loss"] + line["hidden_loss"], rel=1e-5
        )


def test_evaluation_does_not_leak_into_the_training_log(make_trainer):
    logs = []
    for strategy in ("no", "steps"):
        task = tiny_task("single_label")
        trainer = make_trainer(
            task, eval_dataset=task.rows, eval_strategy=strategy, eval_steps=1, max_steps=4, logging_strategy="steps",
            logging_steps=2,
        )  # fmt: skip
        trainer.train()
        logs.append([line["soft_loss"] for line in trainer.state.log_history if "loss" in line])
    assert logs[0] == logs[1]


def test_evaluation_may_leave_the_teacher_out(make_trainer):
    task = tiny_task("single_label")
    trainer = make_trainer(task, eval_dataset=task.rows, eval_with_teacher=False)
    with_teacher = make_trainer(task, eval_dataset=task.rows).evaluate()
    trainer.teacher = None  # asking it would fail
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == with_teacher["eval_loss"]
    assert "eval_soft_loss" not in metrics


def test_several_evaluation_sets(make_trainer):
    task = tiny_task("single_label")
    metrics = make_trainer(task, eval_dataset={"a": task.rows[:5], "b": task.rows[5:]}).evaluate()
    assert {"eval_a_loss", "eval_a_soft_loss", "eval_b_loss", "eval_b_soft_loss"} <= set(metrics)


def test_bf16_evaluation_before_training_equals_the_one_after(make_trainer):
    """A registered teacher would keep Trainer from preparing the student, which then ran in fp32."""
    task = tiny_task("single_label")
    metrics = {}
    trainer = make_trainer(task, **PROJECTED, eval_dataset=task.rows, bf16=True, max_steps=1, learning_rate=0.0)
    metrics["before"] = trainer.evaluate()
    trainer.train()
    metrics["after"] = trainer.evaluate()
    fresh = tiny_task("single_label")  # Accelerate has patched the other one's forward
    precise = make_trainer(fresh, **PROJECTED, eval_dataset=fresh.rows).evaluate()
    for key in ("eval_loss", "eval_soft_loss", "eval_hidden_loss"):
        assert metrics["before"][key] == metrics["after"][key]
        assert metrics["before"][key] != precise[key], "bf16 should be visible"
        assert metrics["before"][key] == pytest.approx(precise[key], rel=0.05)


def test_a_student_held_in_bf16_meets_fp32_projections(make_trainer):
    task = tiny_task("single_label")
    task.student.to(torch.bfloat16)
    losses = {"hidden": HiddenStateLoss(), "soft": SoftTargetLoss()}
    trainer = make_trainer(task, losses=losses, max_steps=2, learning_rate=1e-2)
    trainer.train()
    assert {p.dtype for p in trainer.losses.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("cached", [False, True])
def test_an_input_that_metrics_ask_for_still_reaches_the_models(cached, make_trainer, make_args, tmp_path):
    settings = {"label_names": ["labels", "attention_mask"], "per_device_eval_batch_size": 5}
    task, other = tiny_task("single_label", rows=20), tiny_task("single_label", rows=20)
    given = {"teacher_cache_dir": str(tmp_path / "cache")} if cached else {}
    trainer = make_trainer(task, eval_dataset=task.rows, **settings, **given, max_steps=2)
    plain = Trainer(task.student, make_args(cls=TrainingArguments, **settings), task.collate)
    ours, theirs = trainer.evaluate(), plain.evaluate(task.rows)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert ours["eval_soft_loss"] == pytest.approx(
        make_trainer(other, eval_dataset=task.rows, per_device_eval_batch_size=5).evaluate()["eval_soft_loss"],
        rel=1e-5,
    )
    assert [labels.shape for labels in trainer.predict(task.rows).label_ids] == [(20,), (20, 12)]
