"""Ways in which people already use Trainer."""

import copy

import datasets
import pytest
import torch
from parity import different_tensors
from transformers import Trainer, TrainingArguments

import hf_distill
from hf_distill import DistillationTrainer
from hf_distill.losses import DISTLoss, SoftTargetLoss
from hf_distill.testing import tiny_task


def weights(trainer):
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


class TestHyperparameterSearch:
    @pytest.fixture
    def search(self, make_trainer):
        pytest.importorskip("optuna")

        def run(space, trials=2, **kwargs):
            task = tiny_task("single_label")
            fresh = copy.deepcopy(task.student)
            seen = []

            class Watching(hf_distill.DistillationTrainer):
                def compute_loss(self, *args, **kwargs):
                    seen.append(self.losses.equation())
                    return super().compute_loss(*args, **kwargs)

            trainer = make_trainer(
                task,
                Watching,
                model_init=lambda: copy.deepcopy(fresh),
                eval_dataset=task.rows[:8],
                max_steps=1,
                **kwargs,
            )
            trainer.hyperparameter_search(space, n_trials=trials, direction="minimize", backend="optuna")
            return [equation for i, equation in enumerate(seen) if i == 0 or equation != seen[i - 1]]

        return run

    def test_each_trial_trains_with_its_own_losses(self, search):
        temperatures = iter([3.0, 5.0])
        space = lambda trial: {  # noqa: E731
            "temperature": trial.suggest_float("temperature", *[next(temperatures)] * 2),
            "hidden_state_weight": 2.0,
            "layer_mapping": {1: 3},
        }
        seen = search(space)
        assert [equation.split("T=")[1][0] for equation in seen] == ["3", "5"]
        assert all("2 * hidden[mse, student layer: teacher layer = {1: 3}]" in equation for equation in seen)

    def test_a_value_out_of_range_is_refused(self, search):
        with pytest.raises(ValueError, match=r"temperature must be a finite number above 0, got -3\.5"):
            search(lambda trial: {"temperature": -3.5}, trials=1)

    def test_a_tuned_field_together_with_losses_is_refused(self, search):
        with pytest.raises(ValueError, match="would have no effect"):
            search(lambda trial: {"temperature": 4.0}, trials=1, losses={"soft": SoftTargetLoss()})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
class TestPeft:
    @pytest.fixture
    def lora(self):
        peft = pytest.importorskip("peft")
        task = tiny_task("single_label")
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
        task.student = peft.get_peft_model(task.student, config)
        return task

    def test_only_adapters_and_projections_learn(self, lora, make_trainer, tmp_path):
        frozen = {n: p.clone() for n, p in lora.student.named_parameters() if not p.requires_grad}
        trainer = make_trainer(lora, hidden_state_weight=1.0, max_steps=3, save_strategy="steps", save_steps=1)
        before = weights(trainer)
        trainer.train()
        assert different_tensors({n: p for n, p in lora.student.named_parameters() if n in frozen}, frozen, 0.0) == []
        assert any("lora_B" in name for name in different_tensors(weights(trainer), before))
        assert {path.name for path in (tmp_path / "out" / "checkpoint-3").glob("*.safetensors")} == {
            "adapter_model.safetensors", "distillation_losses.safetensors",
        }  # fmt: skip

    def test_resuming_equals_an_uninterrupted_run(self, make_trainer, tmp_path):
        peft = pytest.importorskip("peft")
        results = []
        for resume in (False, True):
            task = tiny_task("single_label")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                task.student = peft.get_peft_model(
                    task.student, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
                )
            trainer = make_trainer(
                task, hidden_state_weight=1.0, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch"
            )
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resume else None)
            results.append({**weights(trainer), **trainer.losses.state_dict()})
        assert different_tensors(results[1], results[0]) == []


def test_streaming_datasets(make_trainer):
    task = tiny_task("token")
    dataset = datasets.Dataset.from_list(task.rows)
    results = []
    for data in (dataset, dataset.to_iterable_dataset()):
        student = copy.deepcopy(task.student)
        trainer = make_trainer(
            task, model=student, train_dataset=data, max_steps=3, hidden_state_weight=1.0,
            per_device_train_batch_size=4, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        results.append(weights(trainer))
    assert different_tensors(results[1], results[0]) == []


def test_group_by_length_sees_the_same_batches_as_a_plain_trainer(make_trainer, make_args):
    task = tiny_task("single_label")
    grouped = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    ours = make_trainer(task, **grouped)
    plain = Trainer(task.student, make_args(cls=TrainingArguments, **grouped), task.collate, task.rows)
    batches = []
    for trainer in (ours, plain):
        torch.manual_seed(0)
        batches.append([batch["input_ids"] for batch in trainer.get_train_dataloader()])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    random_order = list(make_trainer(task, per_device_train_batch_size=4).get_train_dataloader())
    assert sum(ids.numel() for ids in batches[0]) < sum(batch["input_ids"].numel() for batch in random_order)


def test_class_weights_by_compute_loss_func(make_trainer):
    weight = torch.tensor([0.1, 1.0, 3.0])

    def weighted(outputs, labels, num_items_in_batch=None):
        losses = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight, reduction="sum")
        return losses / num_items_in_batch

    results = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        trainer = make_trainer(
            tiny_task("single_label"), compute_loss_func=weighted, max_steps=2, hidden_state_weight=1.0,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        results.append(weights(trainer))
    assert different_tensors(results[1], results[0]) == []


@pytest.mark.parametrize("projections", [False, True])
def test_torch_compile_changes_nothing(projections, make_trainer):
    results = []
    for compiled in (False, True):
        settings = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = make_trainer(
            tiny_task("single_label"), max_steps=2, hidden_state_weight=float(projections), **settings
        )
        trainer.train()
        results.append(weights(trainer))
    assert different_tensors(results[1], results[0]) == []


class Rows:
    """A dataset that is no torch Dataset, as a data loader takes it."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Once(torch.utils.data.IterableDataset):
    """Rows that are read from the beginning, such as WebDataset's."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("kind", [Rows, tuple, Once])
@pytest.mark.parametrize("weights", [{"attention_weight": 1.0}, {"hidden_state_weight": 1.0}])
def test_any_data_that_trainer_reads_builds_the_losses_on_layers(kind, weights, make_trainer):
    """The rows of a stream are not looked at beforehand; texts stand for them."""
    settings = {**weights, "max_steps": 2, "eval_with_teacher": False, "data_seed": 1}
    plain, task = tiny_task("single_label"), tiny_task("single_label")
    trainer = make_trainer(task, train_dataset=kind(task.rows), **settings)
    trainer.train()
    same = make_trainer(plain, train_dataset=Once(plain.rows) if kind is Once else plain.rows, **settings)
    same.train()
    assert different_tensors(task.student.state_dict(), plain.student.state_dict()) == []
    assert different_tensors(task.student.state_dict(), tiny_task("single_label").student.state_dict())


def test_the_first_rows_of_a_stream_are_checked_when_they_come(make_trainer):
    task = tiny_task("single_label")
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in task.rows]
    with pytest.raises(ValueError, match="the training data has no column labels"):
        make_trainer(task, train_dataset=Once(rows), max_steps=1).train()
    task = tiny_task("multi_label")
    task.student.config.problem_type = task.teacher.config.problem_type = None
    trainer = make_trainer(task, train_dataset=Once(task.rows), losses={"dist": DISTLoss()}, max_steps=1)
    with pytest.raises(ValueError, match="not defined for this task"):
        trainer.train()


def test_a_stream_of_images_cannot_be_looked_at_beforehand(make_trainer):
    task = tiny_task("image")
    with pytest.raises(ValueError, match=r"Once gives none beforehand\. Pass a dataset with a length"):
        make_trainer(task, train_dataset=Once(task.rows), hidden_state_weight=1.0, max_steps=1)
    make_trainer(task, train_dataset=Once(task.rows), max_steps=1).train()


@pytest.mark.parametrize("calls_ours", [True, False])
def test_a_loss_of_ones_own_that_leaves_the_teacher_out_is_refused(calls_ours, make_trainer):
    """The commonest subclass of Trainer weighs classes without super()."""

    class Weighted(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            if calls_ours:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                loss, outputs = 0.0, model(**{key: value for key, value in inputs.items() if key != "labels"})
            loss = loss + torch.nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    trainer = make_trainer(tiny_task("single_label"), trainer_class=Weighted, max_steps=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if calls_ours:
        trainer.train()
        return
    with pytest.raises(ValueError, match=r"Weighted.compute_loss does not call DistillationTrainer's"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
