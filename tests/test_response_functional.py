"""The formulas on answers against SciPy and float64 loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr, zscore
from test_functional import CASES, DTYPES, TEMPERATURES, logits, numpy64, oracle_kl

from hf_distill.functional import (
    decoupled_kl_divergences,
    kl_divergence,
    pairwise_ranking_divergence,
    pearson_distance,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    standardize,
    total_variation_distance,
)


def probabilities(student, teacher, temperature):
    """q and p in float64."""
    return (softmax(numpy64(x) / temperature, axis=-1) for x in (student, teacher))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_skewed_divergences_are_those_of_scipy(case, temperature, dtype, skew):
    student, teacher = logits(case, dtype)
    q, p = probabilities(student, teacher, temperature)
    forward = rel_entr(p, skew * p + (1 - skew) * q).sum(-1) * temperature**2
    backward = rel_entr(q, skew * q + (1 - skew) * p).sum(-1) * temperature**2
    ours = [f(student, teacher, temperature, skew) for f in (skewed_kl_divergence, skewed_reverse_kl_divergence)]
    rounding = 1e-4 / (1 - skew)  # the mixture lies that much closer than the other side
    np.testing.assert_allclose(ours[0].numpy(), forward, rtol=rounding)
    np.testing.assert_allclose(ours[1].numpy(), backward, rtol=rounding)


def test_skew_towards_zero_is_the_plain_divergence():
    student, teacher = logits("few classes", torch.float64, scale=1.0)
    near_zero = [f(student, teacher, 2.0, 1e-6) for f in (skewed_kl_divergence, skewed_reverse_kl_divergence)]
    np.testing.assert_allclose(near_zero[0].numpy(), oracle_kl(teacher, student, 2.0), rtol=1e-4)
    np.testing.assert_allclose(near_zero[1].numpy(), oracle_kl(student, teacher, 2.0), rtol=1e-4)
    assert torch.equal(
        skewed_reverse_kl_divergence(student, teacher, 2.0, 0.0), reverse_kl_divergence(student, teacher, 2.0)
    )


def test_skew_towards_one_is_half_a_chi_square():
    """KL(p || p + e (q - p)) = e² / 2 * sum of (q - p)² / p, to the second order in e."""
    student, teacher = logits("few classes", torch.float64, scale=1.0)
    q, p = probabilities(student, teacher, 1.0)
    rest = 1e-4
    ours = skewed_kl_divergence(student, teacher, 1.0, 1 - rest).numpy() / rest**2
    np.testing.assert_allclose(ours, ((q - p) ** 2 / p).sum(-1) / 2, rtol=1e-2)


def test_skewed_divergence_is_bounded_where_the_plain_one_is_not():
    teacher, student = torch.tensor([[60.0, 0.0, -60.0]]), torch.tensor([[-60.0, 0.0, 60.0]])
    assert kl_divergence(student, teacher) > 100
    for function in (skewed_kl_divergence, skewed_reverse_kl_divergence):
        assert function(student, teacher, 1.0, 0.1).item() == pytest.approx(-math.log(0.1), rel=1e-5)


def test_total_variation_is_the_largest_difference_over_all_events():
    student, teacher = logits("few classes", torch.float32)
    q, p = probabilities(student, teacher, 2.0)
    events = [list(event) for size in range(6) for event in itertools.combinations(range(5), size)]
    largest = np.max([np.abs(p[:, event].sum(-1) - q[:, event].sum(-1)) for event in events], axis=0)
    np.testing.assert_allclose(total_variation_distance(student, teacher, 2.0).numpy(), 2.0 * largest, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_total_variation_is_half_an_l1_distance(case, temperature, dtype):
    student, teacher = logits(case, dtype)
    q, p = probabilities(student, teacher, temperature)
    expected = np.abs(p - q).sum(-1) / 2 * temperature
    ours = total_variation_distance(student, teacher, temperature)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-3)
    assert torch.equal(ours, total_variation_distance(teacher, student, temperature))
    assert ours.max() <= temperature * (1 + 1e-5)


def test_total_variation_tends_to_a_distance_of_the_logits_as_it_gets_hot():
    """p - q -> (z - v - mean) / (V T): with one factor T the value has a limit, with T² it would grow."""
    student, teacher = logits("few classes", torch.float64)
    difference = numpy64(teacher - student)
    limit = np.abs(difference - difference.mean(-1, keepdims=True)).mean(-1) / 2
    np.testing.assert_allclose(total_variation_distance(student, teacher, 1e5).numpy(), limit, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["few classes", "BERT's vocabulary"])
def test_standardized_logits_are_scipys_z_scores(case, dtype):
    student, _ = logits(case, dtype)
    np.testing.assert_allclose(standardize(student).numpy(), zscore(numpy64(student), axis=-1), rtol=1e-4, atol=1e-5)


def test_z_scores_see_neither_shift_nor_scale():
    student, _ = logits("few classes", torch.float64)
    for moved in (5 * student - 3, 1e-12 * student, 1e12 * student):
        torch.testing.assert_close(standardize(moved), standardize(student), rtol=1e-9, atol=1e-9)
    tiny = (1e-30 * student).float()  # whose squares are 0 in fp32
    torch.testing.assert_close(standardize(tiny), standardize(student.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_vector_that_does_not_vary_has_no_z_scores_and_no_gradient(value):
    x = torch.full((2, 7), value, requires_grad=True)
    standardize(x).square().sum().backward()
    assert standardize(x).abs().max() == 0
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["few classes", "BERT's vocabulary", "close, few classes"])
def test_pearson_distance_is_one_minus_scipys_correlation(case, dtype):
    student, teacher = logits(case, dtype)
    expected = [1 - pearsonr(s, t).statistic for s, t in zip(numpy64(student), numpy64(teacher), strict=True)]
    np.testing.assert_allclose(pearson_distance(student, teacher).numpy(), expected, rtol=1e-4, atol=1e-9)


def test_pearson_distance_knows_its_extremes():
    x, _ = logits("few classes", torch.float64)
    torch.testing.assert_close(pearson_distance(3 * x + 1, x), torch.zeros(16).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(pearson_distance(-3 * x + 1, x), torch.full((16,), 2.0).double(), rtol=1e-9, atol=0)


def oracle_decoupled(student, teacher, target, temperature):
    """TCKD and NCKD by the paper's definitions, one position after the other."""
    parts = []
    for q, p, t in zip(*probabilities(student, teacher, temperature), target.tolist(), strict=True):
        binary = [np.array([x[t], np.delete(x, t).sum()]) for x in (p, q)]
        others = [np.delete(x, t) / np.delete(x, t).sum() for x in (p, q)]
        parts.append([rel_entr(*binary).sum() * temperature**2, rel_entr(*others).sum() * temperature**2])
    return np.array(parts).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_decoupled_parts_are_those_of_a_loop_and_add_up_to_kl(case, temperature, dtype):
    student, teacher = logits(case, dtype)
    target = torch.arange(len(student)) % student.shape[-1]
    tckd, nckd = decoupled_kl_divergences(student, teacher, target, temperature)
    expected = oracle_decoupled(student, teacher, target, temperature)
    # A bin of 30521 classes is summed in fp32: its log is good to some 1e-7, and the KL of close bins is small.
    np.testing.assert_allclose(tckd.numpy(), expected[0], rtol=2e-3, atol=1e-9)
    np.testing.assert_allclose(nckd.numpy(), expected[1], rtol=1e-4, atol=1e-12)
    p = numpy64(teacher.double().div(temperature).softmax(-1).gather(-1, target[:, None])[:, 0])
    total = tckd.numpy() + (1 - p) * nckd.numpy()
    np.testing.assert_allclose(total, oracle_kl(teacher, student, temperature), rtol=1e-3)


def test_other_classes_are_precise_beside_a_teacher_that_is_sure():
    """1 - p is 0 in fp32 here; the other classes' distribution must not come from dividing by it."""
    teacher, student = torch.tensor([[40.0, 1.0, 0.0, -1.0]]), torch.tensor([[30.0, -1.0, 0.0, 2.0]])
    target = torch.tensor([0])
    _, nckd = decoupled_kl_divergences(student, teacher, target)
    np.testing.assert_allclose(nckd.numpy(), oracle_kl(teacher[:, 1:], student[:, 1:], 1.0), rtol=1e-5)


def test_decoupled_targets_of_another_shape_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"one target class a position, \(2,\), got targets of shape \(2, 1\)"):
        decoupled_kl_divergences(x, x, torch.zeros(2, 1, dtype=torch.long))


def oracle_ranking(student, teacher, temperature, top_k=None):
    """The mean over pairs, by two loops."""
    values = []
    for s, t in zip(numpy64(student), numpy64(teacher), strict=True):
        best = np.argsort(-t, kind="stable")[:top_k]
        pairs = []
        for i, j in itertools.combinations(best, 2):
            p, q = expit((t[i] - t[j]) / temperature), expit((s[i] - s[j]) / temperature)
            pairs.append(rel_entr(p, q) + rel_entr(1 - p, 1 - q))
        values.append(np.mean(pairs) * temperature**2)
    return np.array(values)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("case", "top_k"),
    [("two classes", None), ("few classes", None), ("few classes", 3), ("few classes", 9), ("BERT's vocabulary", 8)],
)
def test_ranking_is_that_of_a_loop_over_pairs(case, top_k, temperature):
    student, teacher = logits(case, torch.float32)
    ours = pairwise_ranking_divergence(student, teacher, temperature, top_k)
    np.testing.assert_allclose(
        ours.numpy(), oracle_ranking(student, teacher, temperature, top_k), rtol=1e-4, atol=1e-9
    )


def test_ranking_takes_masked_classes_for_the_least():
    masked = torch.tensor([[2.0, -torch.inf, 0.0, -torch.inf]])
    other = torch.tensor([[1.0, -torch.inf, 1.0, -torch.inf]])
    student = other.clone().requires_grad_()
    value = pairwise_ranking_divergence(student, masked)
    value.sum().backward()
    seen = pairwise_ranking_divergence(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
    assert value.item() == pytest.approx(seen.item() / 6)  # of six pairs the others are as the teacher has them
    assert bool(student.grad.isfinite().all())


def test_ranking_of_two_classes_is_forward_kl():
    student, teacher = logits("two classes", torch.float64)
    np.testing.assert_allclose(
        pairwise_ranking_divergence(student, teacher, 2.0).numpy(), oracle_kl(teacher, student, 2.0), rtol=1e-6
    )


def test_ranking_weighs_all_pairs_where_kl_forgets_the_improbable():
    teacher = torch.tensor([[20.0, 1.0, 0.0]])
    student = torch.tensor([[20.0, 0.0, 1.0]])  # the two improbable classes exchanged
    assert kl_divergence(student, teacher) < 1e-6
    assert pairwise_ranking_divergence(student, teacher) > 0.1


@pytest.mark.parametrize(("shape", "top_k"), [((2, 1), None), ((2, 5), 1)])
def test_ranking_needs_a_pair(shape, top_k):
    with pytest.raises(ValueError, match="at least two classes"):
        pairwise_ranking_divergence(torch.zeros(shape), torch.zeros(shape), 1.0, top_k)


TARGET = torch.tensor([0, 4, 2])
FUNCTIONS = {
    "skewed": lambda s, t, temperature: skewed_kl_divergence(s, t, temperature, 0.3),
    "skewed reverse": lambda s, t, temperature: skewed_reverse_kl_divergence(s, t, temperature, 0.3),
    "total variation": total_variation_distance,
    "standardized": lambda s, t, temperature: kl_divergence(standardize(s), standardize(t), temperature),
    "pearson": lambda s, t, temperature: pearson_distance(s / temperature, t),
    "decoupled": lambda s, t, temperature: sum(decoupled_kl_divergences(s, t, TARGET, temperature)),
    "ranking": lambda s, t, temperature: pairwise_ranking_divergence(s, t, temperature, 3),
}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_is_the_derivative(name, temperature):
    student, teacher = (x[:3].requires_grad_() for x in logits("few classes", torch.float64))
    assert torch.autograd.gradcheck(lambda s, t: FUNCTIONS[name](s, t, temperature), (student, teacher))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_distance_is_zero_at_identity_and_blind_to_a_constant(name, dtype):
    _, teacher = logits("few classes", dtype)
    teacher = teacher[:3]
    assert FUNCTIONS[name](teacher, teacher, 2.0).abs().max() < 1e-6
    student, teacher = (x[:3] for x in logits("few classes", torch.float64))
    moved = FUNCTIONS[name](student + 7.0, teacher - 3.0, 2.0)
    torch.testing.assert_close(moved, FUNCTIONS[name](student, teacher, 2.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4), (3, 4)])
def test_different_shapes_are_refused_instead_of_broadcast(name, shape):
    with pytest.raises(ValueError, match="shape"):
        FUNCTIONS[name](torch.ones(shape), torch.ones(2, 3, 4), 1.0)
