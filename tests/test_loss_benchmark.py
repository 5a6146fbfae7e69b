"""The measured comparison of losses: what is read, run and shown. Nothing is trained here."""

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a script as it runs in its own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    monkeypatch.syspath_prepend(str(EXAMPLES / "data"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return import_module


def line(losses, rate, seed, validation, test, task="movies"):
    return {
        "task": task, "losses": losses, "learning_rate": rate, "seed": seed, "validation": validation, "test": test,
    }  # fmt: skip


def test_the_table_shows_the_test_accuracy_of_the_rate_that_won_on_validation(example):
    lines = [
        line("KL", 1e-3, 0, 0.80, 0.70), line("KL", 2e-3, 0, 0.79, 0.99), line("KL", 1e-3, 1, 0.1, 0.72),
        line("KL", 1e-3, 2, 0.1, 0.74), line("DIST", 1e-3, 0, 0.5, 0.6),
    ]  # fmt: skip
    shown = example("losses").table(lines).splitlines()
    assert shown == ["| losses | movies |", "| :-- | --: |", "| KL | 72.0 ± 2.0 |", "| DIST | 60.0 (1) |"]


def test_a_run_that_is_on_disk_is_not_repeated(example, tmp_path, monkeypatch):
    losses, ran = example("losses"), []

    def run(task, name, rate, seed, cache):
        ran.append((name, rate, seed))
        return line(name, rate, seed, -abs(rate - 4e-3), 0.5)  # the best of all would be 4e-3

    monkeypatch.setattr(losses, "run", run)
    output, task = tmp_path / "runs.jsonl", Namespace(name="movies", learning_rates=(1e-3, 3e-3, 2e-3))
    for _ in range(2):
        runs = losses.Runs(task, output, tmp_path)
        assert runs.best_rate("KL") == 3e-3
        assert runs("KL", 3e-3, 0)["seed"] == 0
    assert len(ran) == 4  # a higher rate than the best of the three, too
    assert len([json.loads(text) for text in output.read_text().splitlines()]) == 4


def test_every_combination_builds_and_there_are_at_most_twelve_beside_the_baselines(example):
    losses = example("losses")
    assert len(losses.COMBINATIONS) - 2 <= 12
    for name in losses.COMBINATIONS:
        terms = losses.losses_of(name, Namespace(pooling="mean"))
        assert terms["hard"].weight == (1.0 if name == losses.HARD else 0.5)
        assert ("soft" in terms) or name not in losses.BESIDE


def test_the_assistants_difference_is_paired_by_seed(example):
    shown = example("assistants").difference([0.90, 0.94], [0.88, 0.91], 797)
    assert shown == (
        "Through assistants 92.0 ± 2.8 %, directly 89.5 ± 2.1 %: +2.5 points (standard deviation over the seeds 0.7), "
        "on 797 images."
    )
