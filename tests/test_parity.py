"""The result does not depend on how a batch is split into micro-batches and processes."""

import functools
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import coupled_terms, different_tensors, evaluate_weighted, fitted_terms, following_terms, run
from transformers import Trainer, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.teachers import EMATeacher
from hf_distill.testing import TASKS


@functools.cache
def whole_batch(name):
    return run(name, batch_size=16, accumulation=1)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Every task on two gloo processes, 4 rows x 2 micro-batches each; one pair of processes for all of them."""
    path = tmp_path_factory.mktemp("ddp") / "results.pt"
    script = Path(__file__).with_name("parity.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=False)


def assert_same_run(ours, theirs):
    for part in ("gradients", "weights", "losses"):
        assert different_tensors(ours[part], theirs[part]) == [], part
    assert ours["losses"], "the losses should have learned parameters in this test"
    assert len(ours["metrics"]) == 14
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
    for mine, other in zip(ours["logs"], theirs["logs"], strict=True):
        terms = {key for key in other if key.endswith("loss")}
        assert len(terms) == 13
        assert {key: mine[key] for key in terms} == pytest.approx({key: other[key] for key in terms}, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 4), (2, 8)])
def test_result_does_not_depend_on_accumulation(name, batch_size, accumulation):
    assert_same_run(run(name, batch_size, accumulation), whole_batch(name))


@pytest.mark.parametrize("name", TASKS)
def test_result_does_not_depend_on_processes(name, two_processes):
    assert_same_run(two_processes[name], whole_batch(name))


def test_the_evaluation_of_a_user_s_own_loss_does_not_depend_on_processes(two_processes):
    plain = evaluate_weighted(Trainer, TrainingArguments)
    alone = evaluate_weighted(DistillationTrainer, DistillationTrainingArguments, teacher_model=True)
    assert alone["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert two_processes["weighted"] == pytest.approx(alone, rel=1e-5)


def test_losses_that_couple_rows_do_not_depend_on_processes(two_processes):
    """The same four micro-batches a step, on one process and on two."""
    ours, theirs = two_processes["coupled"], run("token", batch_size=4, accumulation=4, losses=coupled_terms())
    for part in ("gradients", "weights", "losses"):
        assert different_tensors(ours[part], theirs[part]) == [], part
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)


def test_what_is_learned_beforehand_does_not_depend_on_processes(two_processes):
    ours, theirs = two_processes["fitted"], run("single_label", batch_size=16, accumulation=1, losses=fitted_terms())
    for part in ("gradients", "weights", "losses"):
        assert different_tensors(ours[part], theirs[part]) == [], part
    assert theirs["losses"]["lelp.fitted"]
    assert theirs["losses"]["lelp.directions"].any()


def test_a_teacher_that_follows_does_not_depend_on_processes_or_accumulation(two_processes):
    whole = run("single_label", 16, 1, following_terms(), EMATeacher(0.8))
    for ours in (two_processes["following"], run("single_label", 4, 4, following_terms(), EMATeacher(0.8))):
        for part in ("weights", "teacher"):
            assert different_tensors(ours[part], whole[part]) == [], part
    assert different_tensors(whole["teacher"], whole["weights"])
