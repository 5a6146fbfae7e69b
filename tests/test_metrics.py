"""The metrics' formulas, against scikit-learn and closed forms, and as `evaluate` modules without the Hub."""

import math
import socket

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, r2_score

from hf_distill import metrics
from hf_distill.metrics import scores


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    given = np.where(rng.random(400) < 0.7, labels, rng.integers(0, 9, 400))  # classes 7 and 8 are never right
    return given, labels


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and no file outside the test's own folder."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a look-up of a host"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def test_accuracy_and_macro_f1_are_scikit_learns(answers):
    given, labels = answers
    assert scores.accuracy(given, labels) == pytest.approx(accuracy_score(labels, given))
    assert scores.macro_f1(given, labels) == pytest.approx(f1_score(labels, given, average="macro", zero_division=0))


def test_ignored_labels_count_nowhere(answers):
    given, labels = answers
    padded = np.concatenate([labels, np.full(50, -100)]).reshape(45, 10)
    answered = np.concatenate([given, np.zeros(50, dtype=int)]).reshape(45, 10)
    for score in (scores.accuracy, scores.macro_f1, scores.agreement):
        assert score(answered, padded) == pytest.approx(score(given, labels))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_is_a_loop_over_the_papers_equation(bins):
    rng = np.random.default_rng(1)
    confidence, right = rng.random(500), rng.random(500) < 0.6
    confidence[:3] = 0.0, 1.0, 0.2
    expected = 0.0
    for m in range(bins):
        inside = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins or (m == 0 and c == 0)]
        if inside:
            gap = abs(np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
            expected += len(inside) / len(right) * gap
    assert scores.expected_calibration_error(confidence, right, bins) == pytest.approx(expected)


def test_calibration_error_does_not_depend_on_bins_where_confidence_is_always_too_high():
    right = np.array([True, False] * 50)
    assert scores.expected_calibration_error(np.full(100, 1.0), right) == pytest.approx(0.5)


def test_logits_are_no_confidences():
    with pytest.raises(ValueError, match="Pass softmax outputs, not logits"):
        scores.expected_calibration_error([3.0, 0.5], [True, False])


def test_retention_above_chance_of_an_error_is_the_quotient_of_explained_variances():
    rng = np.random.default_rng(2)
    labels = rng.normal(size=300)
    student, teacher = labels + rng.normal(0, 0.6, 300), labels + rng.normal(0, 0.3, 300)
    errors = [((side - labels) ** 2).mean() for side in (student, teacher)]
    above = scores.retention_above_chance(*errors, chance=labels.var(), greater_is_better=False)
    assert above == pytest.approx(r2_score(labels, student) / r2_score(labels, teacher))
    assert scores.retention(*errors, greater_is_better=False) == pytest.approx(errors[1] / errors[0])


def test_retention_without_meaning_is_not_a_number():
    assert math.isnan(scores.retention(0.1, -0.2))
    assert math.isnan(scores.retention(0.0, 0.1, greater_is_better=False))
    assert math.isnan(scores.retention_above_chance(0.6, 0.5, chance=0.5))
    assert math.isnan(scores.retention_above_chance(0.6, 0.9, chance=0.9, greater_is_better=False))


@pytest.mark.parametrize(("given", "labels", "match"), [
    ([0, 1], [0], "same shape"), ([], [], "nothing to judge"), ([1], [-100], "nothing to judge"),
])  # fmt: skip
def test_answers_that_do_not_fit_are_refused(given, labels, match):
    with pytest.raises(ValueError, match=match):
        scores.accuracy(given, labels)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_every_module_is_loaded_by_evaluate_without_the_hub(name, answers):
    given, labels = answers
    module = metrics.load(name)
    if name == "retention":
        found = module.compute(predictions=[0.6, 0.7], references=[0.8, 0.8], chance=0.5)
        assert found == pytest.approx({"retention": 0.8125, "retention_above_chance": 0.5})
    elif name == "expected_calibration_error":
        found = module.compute(predictions=[[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]], references=[0, 1, -100])
        assert found == pytest.approx({name: 0.25})
    else:
        expected = getattr(scores, name)(given, labels)
        assert module.compute(predictions=given, references=labels) == pytest.approx({name: expected})


def test_token_classes_come_as_lists_of_lists():
    found = metrics.load("agreement").compute(predictions=[[0, 1, 1], [1]], references=[[0, -100, 1], [0]])
    assert found["agreement"] == pytest.approx(2 / 3)


def test_retention_of_a_loss_is_the_other_way_round():
    found = metrics.load("retention").compute(predictions=[0.5], references=[0.4], greater_is_better=False)
    assert found == pytest.approx({"retention": 0.8})


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="accuracy, agreement"):
        metrics.path("bleu")
