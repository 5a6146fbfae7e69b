"""Shared by all tests."""

import logging

import datasets
import pytest
import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments

# With a second process on a core, tiny models were a hundred times slower on two threads than on one.
torch.set_num_threads(1)
datasets.disable_progress_bars()


def pytest_addoption(parser):
    parser.addoption(
        "--on-gpu", action="store_true", help="trainers of `make_args` use the GPU; oracles stay as they are"
    )


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def deprecations_in_the_log_are_failures():
    """Transformers tells most of its deprecations through its logger."""
    told = []

    class Listener(logging.Handler):
        def emit(self, record):
            if "deprecated" in record.getMessage().lower():
                told.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("transformers").addHandler(listener)
    yield
    logging.getLogger("transformers").removeHandler(listener)
    assert not told


@pytest.fixture(autouse=True, scope="session")
def fp32_unless_a_test_says_otherwise():
    """A cache is filled in bf16 where the processor computes in it; the oracles here are exact on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("hf_distill.teachers.loading", "hf_distill.recipes.material"):
            patch.setattr(f"{module}.has_fast_bf16", lambda device: False)
        yield


@pytest.fixture
def make_args(tmp_path, pytestconfig):
    """Quiet arguments, on the CPU unless `--on-gpu`; SGD, since AdamW turns rounding noise into steps."""

    def make(**kwargs):
        cls = kwargs.pop("cls", DistillationTrainingArguments)
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": not pytestconfig.getoption("--on-gpu", default=False),
            "report_to": "none",
            "disable_tqdm": True,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 16,
        }
        return cls(**{**defaults, **kwargs})

    return make


@pytest.fixture
def make_trainer(make_args):
    """A trainer on a `TinyTask`; keyword arguments that are Trainer's own go to it, all others into the arguments."""
    own = {
        "model", "losses", "teacher_model", "eval_dataset", "train_dataset", "data_collator", "compute_metrics",
        "model_init", "compute_loss_func", "callbacks", "processing_class", "teacher_processing_class", "optimizers",
    }  # fmt: skip

    def make(task, trainer_class=DistillationTrainer, args=None, **kwargs):
        trainer = {
            "model": None if "model_init" in kwargs else task.student,
            "teacher_model": task.teacher,
            "train_dataset": task.rows,
            "data_collator": task.collate,
            **{key: kwargs.pop(key) for key in list(kwargs) if key in own},
        }
        return trainer_class(args=args or make_args(**kwargs), **trainer)

    return make
