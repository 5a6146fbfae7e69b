"""The losses on answers in the trainer: which tasks they are refused for, and that the others learn from them."""

import pytest
from parity import different_tensors, run

from hf_distill.activations import Head
from hf_distill.losses import (
    DecoupledLoss,
    DISTLoss,
    HardLabelLoss,
    LogitMSELoss,
    LossTerms,
    RankingLoss,
    SoftTargetLoss,
)
from hf_distill.losses.soft_target import DIVERGENCES
from hf_distill.testing import TASKS, check_loss, tiny_task
from hf_distill.training_args import build_losses


def two_classes():
    """The single-label task with the third class gone."""
    task = tiny_task("single_label")
    for name in ("student", "teacher"):
        config = getattr(task, name).config
        config.id2label, config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
        setattr(task, name, type(task.student)(config))
    for row in task.rows:
        row["labels"] %= 2
    return task


REFUSED = [
    (LogitMSELoss(), ("question_answering",)),
    (DISTLoss(), ("question_answering", "multi_label", "regression")),
    (DISTLoss(intra_class_weight=0.0), ("two_classes",)),
    (DecoupledLoss(), ("multi_label", "regression", "two_classes")),
    (RankingLoss(), ("question_answering", "multi_label", "regression")),
    (SoftTargetLoss(standardize=True), ("question_answering", "multi_label", "regression", "two_classes")),
]


@pytest.mark.parametrize(
    ("loss", "name"), [pytest.param(a, b, id=f"{type(a).__name__} {b}") for a, names in REFUSED for b in names]
)
def test_a_loss_without_meaning_is_refused_before_training(loss, name, make_trainer):
    task = two_classes() if name == "two_classes" else tiny_task(name)
    trait = {"question_answering": "span", "multi_label": "multi_label_classification"}.get(name, name)
    with pytest.raises(
        ValueError, match=rf"The loss 'own' \({type(loss).__name__}\) is not defined .*\({trait}\): .+\."
    ):
        make_trainer(task, losses={"own": loss, "soft": SoftTargetLoss()})


def test_a_problem_that_only_the_labels_tell_is_refused_too(make_trainer):
    task = tiny_task("multi_label")
    task.student.config.problem_type = task.teacher.config.problem_type = None
    with pytest.raises(ValueError, match=r"'dist' \(DISTLoss\) is not defined .*multi_label_classification"):
        make_trainer(task, losses={"dist": DISTLoss()})


def test_a_loss_of_weight_zero_is_not_asked_for_its_meaning(make_trainer):
    make_trainer(tiny_task("regression"), losses={"dist": DISTLoss(weight=0.0), "soft": SoftTargetLoss()})


def test_label_smoothing_of_spans_is_refused(make_trainer):
    with pytest.raises(ValueError, match="those of a span are its tokens"):
        make_trainer(tiny_task("question_answering"), label_smoothing_factor=0.1)


def test_dkd_without_labels_is_refused(make_trainer):
    task = tiny_task("single_label")
    unlabelled = [{key: value for key, value in row.items() if key != "labels"} for row in task.rows]
    with pytest.raises(ValueError, match="The loss 'dkd' learns from labels, but the training data has no column"):
        make_trainer(task, losses={"dkd": DecoupledLoss()}, train_dataset=unlabelled)


def test_dkd_is_left_out_of_an_evaluation_without_labels(make_trainer):
    task = tiny_task("single_label")
    unlabelled = [{key: value for key, value in row.items() if key != "labels"} for row in task.rows]
    trainer = make_trainer(task, losses={"dkd": DecoupledLoss(), "soft": SoftTargetLoss()}, eval_dataset=unlabelled)
    metrics = trainer.evaluate()
    assert "eval_dkd_loss" not in metrics
    assert metrics["eval_soft_loss"] > 0


def test_a_misspelt_reason_is_told():
    loss = LogitMSELoss()
    loss.undefined_for = {"spans": "why"}
    with pytest.raises(ValueError, match=r"LogitMSELoss.undefined_for may name .*got \['spans'\]"):
        LossTerms({"own": loss}).refuse_undefined(Head("span"), "single_label_classification")


def test_a_loss_that_is_undefined_everywhere_has_not_passed():
    loss = LogitMSELoss()
    loss.undefined_for = dict.fromkeys(("rows", "tokens", "causal_lm", "span"), "why")
    with pytest.raises(AssertionError, match="undefined for every head"):
        check_loss(loss)


EVERY_NEW = {
    "skewed": SoftTargetLoss(divergence="skewed_kl"),
    "variation": SoftTargetLoss(divergence="total_variation"),
    "standardized": SoftTargetLoss(standardize=True),
    "mse": LogitMSELoss(weight=0.1),
    "dist": DISTLoss(),
    "dkd": DecoupledLoss(),
    "ranking": RankingLoss(),
}


def defined(name):
    """The new losses that have a meaning for the task."""
    traits = {"question_answering": "span", "multi_label": "multi_label_classification"}
    return {key: loss for key, loss in EVERY_NEW.items() if traits.get(name, name) not in loss.undefined_for}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns_from_what_is_defined_for_it(name, make_trainer):
    task = tiny_task(name, rows=16)
    trainer = make_trainer(
        task, losses=defined(name), eval_dataset=task.rows, max_steps=3, per_device_train_batch_size=16
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_distillation_loss"] < before["eval_distillation_loss"]
    assert all(f"eval_{key}_loss" in after for key in defined(name))


@pytest.mark.parametrize("name", ["token", "question_answering"])
def test_result_does_not_depend_on_accumulation(name):
    kept = {key: loss for key, loss in defined(name).items() if not loss.couples_rows}
    whole, parts = (run(name, *split, losses={"hard": HardLabelLoss(), **kept}) for split in ((16, 1), (4, 4)))
    for part in ("gradients", "weights"):
        assert different_tensors(parts[part], whole[part]) == []
    assert parts["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_arguments_know_every_divergence(divergence, make_args):
    assert build_losses(make_args(divergence=divergence))["soft"].divergence == divergence
