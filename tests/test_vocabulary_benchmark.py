"""The benchmark of large vocabularies: every variant of a job minimises the same loss. Nothing is timed here."""

from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = import_module("vocabulary")
    monkeypatch.setattr(module, "TEACHERS", {"masked": (2, 32, 2), "causal": (2, 32, 2)})
    monkeypatch.setattr(module, "STUDENTS", {"small": (1, 16, 2)})
    jobs = {"masked": ("masked", "small", 1100, 4, 16), "causal": ("causal", "small", 1100, 2, 16)}
    monkeypatch.setattr(module, "JOBS", jobs)
    monkeypatch.setattr(module, "CACHED", tuple(jobs))
    return module


@pytest.mark.parametrize("job", ["masked", "causal"])
def test_every_variant_minimises_the_loss_of_the_naive_loop(job, script, tmp_path, capsys):
    """But fine-tuning, which has another, and the cache of 64 classes, which knows less."""
    lines = script.timed(job, rounds=1)
    assert {"naive loop", script.OURS, script.BY_STATE, script.BY_TOP_K} <= set(lines)
    naive = lines["naive loop"]["loss"]
    for variant in set(lines) - {"plain fine-tuning", script.BY_TOP_K}:
        assert lines[variant]["loss"] == pytest.approx(naive, rel=1e-2 if variant == script.BY_STATE else 1e-5)
    script.print_times(job, lines)
    assert f"| {script.OURS} |" in capsys.readouterr().out
    assert lines["naive loop"]["ratios"]["hf_distill of it"] == lines[script.OURS]["ratios"]["naive loop"]


def test_ratios_are_those_of_each_round(script):
    assert script.paired([1.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == 1.0
