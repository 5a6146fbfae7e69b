"""What is minimised: against hand-written losses, the plain Trainer, and the naive recipe that must fail."""

import datasets
import pytest
import torch
import torch.nn.functional as F
from parity import different_tensors
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, Trainer, TrainingArguments

from hf_distill import DistillationTrainer
from hf_distill.losses import HardLabelLoss, HiddenStateLoss, SoftTargetLoss
from hf_distill.testing import TASKS, PadCollator, tiny_task


def weights(trainer):
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def kd_recipe(temperature=2.0):
    """The recipe that people copy: batch means inside compute_loss."""

    class KdTrainer(Trainer):
        teacher = None

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            logits = model(**inputs).logits
            with torch.no_grad():
                target = self.teacher(**inputs).logits
            log_q, p = (logits / temperature).log_softmax(-1), (target / temperature).softmax(-1)
            return F.kl_div(log_q, p, reduction="batchmean") * temperature**2

    return KdTrainer


def test_the_naive_recipe_depends_on_accumulation(make_args):
    """The oracle of the parity tests can fail: the copied recipe does."""
    results = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        task = tiny_task("single_label")
        args = make_args(
            cls=TrainingArguments, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            max_steps=1, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = kd_recipe()(task.student, args, task.collate, task.rows)
        trainer.teacher = task.teacher.eval()
        before = weights(trainer)
        trainer.train()
        results.append({key: value - before[key] for key, value in weights(trainer).items()})
    assert different_tensors(results[1], results[0], 1e-2)


@pytest.mark.parametrize("name", TASKS)
def test_hard_labels_alone_equal_a_hand_written_mean_over_the_window(name, make_trainer):
    """One step of SGD from the mean over all labels of 4 x 4 ragged rows, written with Transformers' outputs alone."""
    task, copy = tiny_task(name, rows=16), tiny_task(name, rows=16)
    trainer = make_trainer(
        task, soft_target_weight=0.0, hard_label_weight=1.0, teacher_model=None, max_steps=1, max_grad_norm=0.0,
        per_device_train_batch_size=4, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    hand_written_loss(name, copy.student, copy.collate(copy.rows)).backward()
    expected = {n: p.data - 0.1 * p.grad if p.grad is not None else p.data for n, p in copy.student.named_parameters()}
    ours = {n: p.data for n, p in trainer.model.named_parameters()}
    assert different_tensors(ours, expected) == []


def hand_written_loss(name, model, batch):
    labels = batch.pop("labels", None)
    if name == "question_answering":
        start, end = batch.pop("start_positions"), batch.pop("end_positions")
        out = model(**batch)
        padding = batch["attention_mask"] == 0
        logits = [out.start_logits.masked_fill(padding, -1e9), out.end_logits.masked_fill(padding, -1e9)]
        return (F.cross_entropy(logits[0], start) + F.cross_entropy(logits[1], end)) / 2
    logits = model(**batch).logits
    if name == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels)
    if name == "regression":
        return F.mse_loss(logits.squeeze(-1), labels)
    if name == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


@pytest.mark.parametrize("name", ["single_label", "token", "masked_lm", "causal_lm", "regression", "multi_label"])
def test_eval_loss_is_the_models_own_loss(name, make_trainer):
    """The plain Trainer's too, but for GPT-2, whose first label it counts although nothing predicts it."""
    task = tiny_task(name, rows=16)
    ours = make_trainer(task, eval_dataset=task.rows).evaluate()["eval_loss"]
    with torch.no_grad():
        own = task.student(**task.collate(task.rows)).loss
    assert ours == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["single_label", "token", "image"])
def test_eval_loss_equals_a_plain_trainers_over_many_batches(name, make_trainer, make_args):
    task = tiny_task(name, rows=22)
    small = {"per_device_eval_batch_size": 4}
    ours = make_trainer(task, eval_dataset=task.rows, **small).evaluate()["eval_loss"]
    plain = Trainer(task.student, make_args(cls=TrainingArguments, **small), task.collate, eval_dataset=task.rows)
    assert ours == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_label_smoothing_equals_a_plain_trainers(make_trainer, make_args):
    task, copy = tiny_task("token"), tiny_task("token")
    smooth = {"label_smoothing_factor": 0.2, "max_steps": 2}
    ours = make_trainer(
        task, soft_target_weight=0.0, hard_label_weight=1.0, teacher_model=None, eval_dataset=task.rows, **smooth
    )
    plain = Trainer(
        copy.student, make_args(cls=TrainingArguments, **smooth), copy.collate, copy.rows, eval_dataset=copy.rows
    )
    ours.train()
    plain.train()
    assert different_tensors(weights(ours), weights(plain)) == []
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_extra_padding_changes_nothing(name, make_trainer):
    results = []
    for extra in (0, 7):
        task = tiny_task(name)
        losses = {"soft": SoftTargetLoss(positions="all"), "hard": HardLabelLoss(), "hidden": HiddenStateLoss()}
        trainer = make_trainer(task, data_collator=PadCollator(extra), losses=losses, max_steps=2)
        trainer.train()
        results.append(weights(trainer))
    assert different_tensors(results[1], results[0]) == []


@pytest.mark.parametrize("name", ["token", "masked_lm", "causal_lm"])
def test_an_all_masked_batch_is_finite_and_teaches_nothing(name, make_trainer):
    task = tiny_task(name, rows=4)
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in task.rows]
    trainer = make_trainer(task, train_dataset=rows, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert different_tensors(weights(trainer), before, 0.0) == []
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_without_hard_labels_no_labels_are_needed(make_trainer):
    task = tiny_task("token")
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in task.rows]
    trainer = make_trainer(task, train_dataset=rows, eval_dataset=rows, hard_label_weight=0.0, max_steps=8)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_soft_loss"], rel=0.1)  # a mean of batch means
    assert after["eval_soft_loss"] < before["eval_soft_loss"]
    assert "eval_hard_loss" not in after


def test_labels_that_are_missing_are_told_before_the_first_step(make_trainer):
    task = tiny_task("single_label")
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in task.rows]
    with pytest.raises(ValueError, match=r"no column labels.*hard_label_weight=0"):
        make_trainer(task, train_dataset=rows)


def test_compute_loss_func_replaces_the_hard_label_term(make_trainer):
    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    results = []
    for function in (None, summed):
        trainer = make_trainer(
            tiny_task("single_label"), compute_loss_func=function, max_steps=2, per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        results.append(weights(trainer))
    assert different_tensors(results[1], results[0]) == []


def test_losses_replace_all_default_terms(make_trainer):
    trainer = make_trainer(
        tiny_task("single_label"),
        losses={"only": SoftTargetLoss()},
        max_steps=1,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    logged = {key for line in trainer.state.log_history for key in line}
    assert "only_loss" in logged
    assert "hard_loss" not in logged


def test_plain_training_arguments_mean_the_default_losses(make_trainer, make_args):
    trainer = make_trainer(tiny_task("single_label"), args=make_args(cls=TrainingArguments))
    assert {name: loss.weight for name, loss in trainer.losses.active().items()} == {"soft": 1.0, "hard": 0.5}


def test_the_equation_is_printed_once(make_trainer, capsys):
    trainer = make_trainer(tiny_task("single_label"), temperature=3.0, hidden_state_weight=0.25, max_steps=2)
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Minimising")]
    assert printed == [
        "Minimising 1 * soft[forward_kl, T=3] + 0.5 * hard[task loss on labels] + "
        "0.25 * hidden[mse, student layer: teacher layer = {1: 2, 2: 4}]"
    ]


def test_problem_type_is_settled_by_the_labels_as_transformers_does(make_trainer):
    task = tiny_task("single_label", rows=4)
    rows = [{**row, "labels": [1.0, 0.0, 1.0]} for row in task.rows]
    trainer = make_trainer(task, train_dataset=rows, max_steps=1)
    trainer.train()
    assert trainer.model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("stated", [None, "teacher"])
@pytest.mark.parametrize("name", ["single_label", "multi_label", "regression"])
def test_the_student_says_what_its_scores_are_as_after_a_plain_trainer(name, stated, make_trainer, make_args):
    """`pipeline` reads it there; a teacher that was fine-tuned with Transformers states it."""
    plain, task = tiny_task(name), tiny_task(name)
    for model in (plain.student, task.student, task.teacher):
        model.config.problem_type = None
    Trainer(plain.student, make_args(cls=TrainingArguments, max_steps=1), plain.collate, plain.rows).train()
    expected = plain.student.config.problem_type
    task.teacher.config.problem_type = expected if stated else None
    make_trainer(task, max_steps=1).train()
    assert task.student.config.problem_type == expected is not None


def test_a_second_run_logs_its_own_terms_alone(make_trainer):
    def run(trainer):
        trainer.model.load_state_dict(start)
        trainer.train()
        return next(line for line in trainer.state.log_history if "soft_loss" in line)

    task = tiny_task("single_label")
    start = {name: value.clone() for name, value in task.student.state_dict().items()}
    trainer = make_trainer(task, max_steps=3, logging_strategy="steps", logging_steps=2)
    first, second = run(trainer), run(trainer)
    assert {k: second[k] for k in ("loss", "soft_loss", "hard_loss")} == pytest.approx(
        {k: first[k] for k in ("loss", "soft_loss", "hard_loss")}
    )


def test_columns_of_the_users_own_are_no_answers_of_the_teacher(make_trainer):
    weights = []
    for more in ({}, {"teacher_score": 3, "teacher_response": "yes"}):
        task = tiny_task("single_label")
        rows = datasets.Dataset.from_list([{**row, **more} for row in task.rows])
        make_trainer(task, train_dataset=rows, max_steps=2).train()
        weights.append(task.student.state_dict())
    assert different_tensors(*weights, 0.0) == []


def test_a_search_seeks_what_a_plain_trainer_seeks(make_trainer, monkeypatch):
    """By default the metrics of the user, or the task's loss, and no term of the distillation."""
    sought = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda self, space, objective, **_: sought.append(objective))
    trainer = make_trainer(tiny_task("single_label"), eval_dataset=tiny_task("single_label").rows)
    trainer.hyperparameter_search(n_trials=1)
    metrics = trainer.evaluate()
    del metrics["eval_model_preparation_time"]  # Trainer tells it outside of training alone
    assert {"eval_soft_loss", "eval_hard_loss", "eval_distillation_loss"} <= metrics.keys()
    assert sought[0](metrics) == metrics["eval_loss"]
    assert sought[0]({**metrics, "eval_accuracy": 0.25}) == 0.25


def test_a_bert_teacher_of_a_distilbert_student_sees_its_token_types(make_trainer):
    seen = []

    class Watching(DistillationTrainer):
        def _ask_teacher(self, inputs, needs, required):
            seen.append(dict(self._inputs_for("teacher", inputs)))
            assert "token_type_ids" not in self._inputs_for("student", inputs)
            return super()._ask_teacher(inputs, needs, required)

    sizes = {"vocab_size": 37, "max_position_embeddings": 32}
    teacher = AutoModelForSequenceClassification.from_config(
        BertConfig(**sizes, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    )
    student = AutoModelForSequenceClassification.from_config(
        DistilBertConfig(**sizes, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    )
    task = tiny_task("single_label")
    rows = [
        {**row, "labels": row["labels"] % 2, "token_type_ids": [0, *[1] * (len(row["input_ids"]) - 1)]}
        for row in task.rows
    ]
    trainer = make_trainer(
        task, Watching, model=student, teacher_model=teacher, train_dataset=rows, max_steps=1, hidden_state_weight=1.0,
        layer_mapping={1: 2},
    )  # fmt: skip
    trainer.train()
    assert all(batch["token_type_ids"].sum() > 0 for batch in seen)
    assert len(seen) >= 2
