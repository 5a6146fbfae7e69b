"""The maths against SciPy and float64 loops on the very same numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch.nn import functional as torch_functional

from hf_distill.functional import (
    at_least_fp32,
    binary_logits,
    cosine_distance,
    decoupled_kl_divergences,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    normalized_mean_squared_error,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    total_variation_distance,
)

TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
DTYPES = (torch.float32, torch.bfloat16)
# Positions, classes, and how far the student's logits lie from the teacher's (None: independent).
CASES = {
    "two classes": (16, 2, None),
    "few classes": (16, 5, None),
    "BERT's vocabulary": (3, 30522, None),
    "close, few classes": (16, 5, 0.05),
    "close, BERT's vocabulary": (3, 30522, 0.05),
}


def logits(case, dtype, scale=3.0):
    """Student's and teacher's logits."""
    positions, classes, distance = CASES[case]
    generator = torch.Generator().manual_seed(classes)
    teacher = scale * torch.randn(positions, classes, generator=generator)
    noise = torch.randn(positions, classes, generator=generator)
    student = scale * noise if distance is None else teacher + distance * noise
    return student.to(dtype), teacher.to(dtype)


def numpy64(x):
    return x.double().numpy()


def oracle_kl(p_logits, q_logits, temperature):
    """KL(p || q) * T^2 by SciPy in float64, from the logits as they are stored."""
    p, q = (softmax(numpy64(x) / temperature, axis=-1) for x in (p_logits, q_logits))
    return rel_entr(p, q).sum(-1) * temperature**2


def oracle_jsd(student, teacher, temperature, beta):
    p, q = (softmax(numpy64(x) / temperature, axis=-1) for x in (teacher, student))
    mixture = beta * p + (1 - beta) * q
    return (beta * rel_entr(p, mixture) + (1 - beta) * rel_entr(q, mixture)).sum(-1) * temperature**2


def loop_kl(p_logits, q_logits, temperature):
    """The same by plain Python, one class after the other."""
    values = []
    for p_row, q_row in zip(p_logits.tolist(), q_logits.tolist(), strict=True):
        p_sum, q_sum = (math.fsum(math.exp(z / temperature) for z in row) for row in (p_row, q_row))
        terms = (
            math.exp(a / temperature)
            / p_sum
            * ((a / temperature - math.log(p_sum)) - (b / temperature - math.log(q_sum)))
            for a, b in zip(p_row, q_row, strict=True)
        )
        values.append(math.fsum(terms) * temperature**2)
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_forward_kl_is_teacher_against_student_in_float64(case, temperature, dtype):
    student, teacher = logits(case, dtype)
    expected = oracle_kl(teacher, student, temperature)
    np.testing.assert_allclose(kl_divergence(student, teacher, temperature).numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(loop_kl(teacher, student, temperature), expected, rtol=1e-9)  # the oracles agree


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_reverse_kl_is_student_against_teacher_in_float64(case, temperature, dtype):
    student, teacher = logits(case, dtype)
    ours = reverse_kl_divergence(student, teacher, temperature)
    np.testing.assert_allclose(ours.numpy(), oracle_kl(student, teacher, temperature), rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_that_of_scipy(case, temperature, dtype, beta):
    student, teacher = logits(case, dtype)
    ours = jensen_shannon_divergence(student, teacher, temperature, beta)
    np.testing.assert_allclose(ours.numpy(), oracle_jsd(student, teacher, temperature, beta), rtol=1e-4)


@pytest.mark.parametrize("function", [kl_divergence, reverse_kl_divergence, jensen_shannon_divergence])
def test_confident_answers_stay_finite_and_exact(function):
    teacher, student = torch.tensor([[60.0, 0.0, -60.0]]), torch.tensor([[-60.0, 0.0, 60.0]])
    expected = {
        kl_divergence: oracle_kl(teacher, student, 1.0),
        reverse_kl_divergence: oracle_kl(student, teacher, 1.0),
        jensen_shannon_divergence: [math.log(2)],  # nothing in common
    }[function]
    np.testing.assert_allclose(function(student, teacher).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("function", [kl_divergence, reverse_kl_divergence, jensen_shannon_divergence])
def test_divergence_is_zero_at_identity(function, temperature, dtype):
    _, teacher = logits("BERT's vocabulary", dtype)
    assert function(teacher, teacher, temperature).abs().max() < 1e-6 * temperature**2


@pytest.mark.parametrize("function", [kl_divergence, reverse_kl_divergence, jensen_shannon_divergence])
def test_divergence_ignores_a_constant_added_to_all_logits(function):
    student, teacher = logits("few classes", torch.float64)
    moved = function(student + 7.0, teacher - 3.0, 2.0)
    torch.testing.assert_close(moved, function(student, teacher, 2.0), rtol=1e-9, atol=1e-12)


def test_jensen_shannon_is_symmetric_at_one_half_and_nowhere_else():
    student, teacher = logits("few classes", torch.float64)
    swapped = jensen_shannon_divergence(teacher, student, 2.0, 0.5)
    torch.testing.assert_close(jensen_shannon_divergence(student, teacher, 2.0, 0.5), swapped, rtol=1e-9, atol=0)
    aside = [jensen_shannon_divergence(*pair, 2.0, 0.2) for pair in ((student, teacher), (teacher, student))]
    assert (aside[0] - aside[1]).abs().max() > 1e-2
    # Exchanging the two sides is exchanging beta for 1 - beta.
    torch.testing.assert_close(aside[1], jensen_shannon_divergence(student, teacher, 2.0, 0.8), rtol=1e-9, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_jensen_shannon_ends_are_forward_and_reverse_kl(temperature):
    student, teacher = logits("few classes", torch.float32)
    ends = [jensen_shannon_divergence(student, teacher, temperature, beta).numpy() for beta in (0.0, 1.0)]
    np.testing.assert_allclose(ends[0], oracle_kl(teacher, student, temperature), rtol=1e-4)
    np.testing.assert_allclose(ends[1], oracle_kl(student, teacher, temperature), rtol=1e-4)


@pytest.mark.parametrize("beta", [1e-3, 1e-4, 1e-5])
def test_jensen_shannon_over_beta_tends_to_forward_kl(beta):
    student, teacher = logits("few classes", torch.float64, scale=1.0)
    near_zero = jensen_shannon_divergence(student, teacher, 2.0, beta).numpy() / beta
    near_one = jensen_shannon_divergence(student, teacher, 2.0, 1 - beta).numpy() / beta
    # The error is of first order in beta: beta / 2 times a chi-square divergence, about 10 at most on these logits.
    np.testing.assert_allclose(near_zero, oracle_kl(teacher, student, 2.0), rtol=20 * beta)
    np.testing.assert_allclose(near_one, oracle_kl(student, teacher, 2.0), rtol=20 * beta)


def test_jensen_shannon_is_bounded_by_the_entropy_of_beta():
    student, teacher = logits("BERT's vocabulary", torch.float32, scale=20.0)
    bound = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert (jensen_shannon_divergence(student, teacher, 1.0, 0.3) <= bound + 1e-5).all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_its_range_is_refused(beta):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        jensen_shannon_divergence(x, x, 1.0, beta)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    "function",
    [
        kl_divergence,
        reverse_kl_divergence,
        jensen_shannon_divergence,
        lambda s, t, temperature: jensen_shannon_divergence(s, t, temperature, 0.1),
        lambda s, t, temperature: kl_divergence(binary_logits(s), binary_logits(t), temperature),
        lambda s, t, _: mean_squared_error(s, t),
        lambda s, t, _: normalized_mean_squared_error(s, t),
        lambda s, t, _: cosine_distance(s, t),
    ],
    ids=["forward", "reverse", "jsd", "jsd 0.1", "binary", "mse", "normalized", "cosine"],
)
def test_gradient_is_the_derivative(function, temperature):
    student, teacher = (x[:3].requires_grad_() for x in logits("few classes", torch.float64))
    assert torch.autograd.gradcheck(lambda s, t: function(s, t, temperature), (student, teacher))


def test_forward_kl_gradient_has_the_closed_form():
    """T * (student - teacher) probabilities, Hinton et al., 2015, equation 2 times T^2."""
    student, teacher = logits("few classes", torch.float32)
    student.requires_grad_()
    kl_divergence(student, teacher, 4.0).sum().backward()
    q, p = (softmax(numpy64(x.detach()) / 4.0, axis=-1) for x in (student, teacher))
    np.testing.assert_allclose(student.grad.numpy(), 4.0 * (q - p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_logits_turn_a_divergence_into_one_of_bernoulli(dtype, temperature):
    student, teacher = logits("few classes", dtype)
    ours = kl_divergence(binary_logits(student), binary_logits(teacher), temperature)
    p, q = (1 / (1 + np.exp(-numpy64(x) / temperature)) for x in (teacher, student))
    expected = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)) * temperature**2
    assert ours.shape == student.shape
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_cross_entropy_minus_entropy_is_forward_kl():
    """An oracle that is not SciPy's: torch's cross-entropy with probabilities as the target."""
    student, teacher = logits("few classes", torch.float64)
    p = teacher.softmax(-1)
    expected = torch_functional.cross_entropy(student, p, reduction="none") + (p * teacher.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(kl_divergence(student, teacher), expected, rtol=1e-9, atol=1e-12)
    assert np.allclose(log_softmax(numpy64(teacher), axis=-1), teacher.log_softmax(-1).numpy())


def loop(function, student, teacher):
    """`function` of two float64 vectors, one position after the other."""
    student, teacher = numpy64(student), numpy64(teacher)
    values = [
        function(s, t)
        for s, t in zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), strict=True)
    ]
    return np.array(values).reshape(student.shape[:-1])


def unit(x):
    return x / math.sqrt(math.fsum(x * x))


DISTANCES = {
    mean_squared_error: lambda s, t: math.fsum((s - t) ** 2) / len(s),
    normalized_mean_squared_error: lambda s, t: math.fsum((unit(s) - unit(t)) ** 2),
    cosine_distance: lambda s, t: 1 - math.fsum(unit(s) * unit(t)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", DISTANCES)
def test_distance_between_vectors_is_that_of_a_loop(function, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 384, generator=generator).to(dtype) for _ in range(2))
    ours = function(student, teacher)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), loop(DISTANCES[function], student, teacher), rtol=1e-4)


@pytest.mark.parametrize("function", [normalized_mean_squared_error, cosine_distance])
def test_angular_distance_ignores_scale_and_knows_its_extremes(function):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    largest = 4.0 if function is normalized_mean_squared_error else 2.0
    torch.testing.assert_close(function(100 * x, x), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(function(-0.01 * x, x), torch.full((4,), largest), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", [normalized_mean_squared_error, cosine_distance])
def test_angular_distance_of_a_zero_vector_has_a_finite_gradient(function):
    student = torch.zeros(1, 4, requires_grad=True)
    function(student, torch.ones(1, 4)).sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("function", DISTANCES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4), (1, 3, 4), (3, 4)])
def test_vectors_of_different_shapes_are_refused_instead_of_broadcast(function, shape):
    with pytest.raises(ValueError, match="must have the same shape"):
        function(torch.ones(shape), torch.ones(2, 3, 4))


@pytest.mark.parametrize("function", [kl_divergence, reverse_kl_divergence, jensen_shannon_divergence])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4), (3, 4)])
def test_logits_of_different_shapes_are_refused_instead_of_broadcast(function, shape):
    with pytest.raises(ValueError, match="shape"):
        function(torch.ones(shape), torch.ones(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_maths_is_done_in_at_least_fp32(dtype):
    assert at_least_fp32(torch.ones(1, dtype=dtype)).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    assert kl_divergence(torch.ones(1, 2, dtype=dtype), torch.ones(1, 2)).dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_classes_that_a_stored_answer_leaves_out_have_no_probability(temperature):
    """The first few logits of an answer are kept, all others are -inf."""
    student, teacher = logits("few classes", torch.float32)
    teacher[:, 3:] = -torch.inf
    student.requires_grad_()
    p, q = (softmax(x.detach().double().numpy() / temperature, -1) for x in (teacher, student))
    mixture = 0.3 * p + 0.7 * q
    divergence = 0.3 * rel_entr(p, mixture).sum(-1) + 0.7 * rel_entr(q, mixture).sum(-1)
    forward = kl_divergence(student, teacher, temperature)
    np.testing.assert_allclose(forward.detach(), rel_entr(p, q).sum(-1) * temperature**2, rtol=1e-4)
    np.testing.assert_allclose(
        jensen_shannon_divergence(student, teacher, temperature, 0.3).detach(), divergence * temperature**2, rtol=1e-4
    )
    (gradient,) = torch.autograd.grad(forward.sum(), student)
    np.testing.assert_allclose(gradient, (q - p) * temperature, atol=1e-5)


MASKABLE = {
    "forward": kl_divergence, "reverse": reverse_kl_divergence, "jensen-shannon": jensen_shannon_divergence,
    "skewed": skewed_kl_divergence, "skewed reverse": skewed_reverse_kl_divergence,
    "total variation": total_variation_distance, "decoupled": lambda x, y, t: sum(
        decoupled_kl_divergences(x, y, torch.zeros(len(x), dtype=torch.long), t)),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", MASKABLE)
def test_a_class_that_both_models_mask_is_as_if_it_were_not_there(name, temperature):
    student, teacher = logits("few classes", torch.float32)
    found = []
    for masked in (False, True):
        ours, theirs = (torch.nn.functional.pad(x, (0, int(masked)), value=-torch.inf) for x in (student, teacher))
        ours.requires_grad_()
        values = MASKABLE[name](ours, theirs, temperature)
        values.sum().backward()
        found.append((values.detach(), ours.grad[:, : student.shape[1]]))
        assert bool((ours.grad[:, student.shape[1] :] == 0).all())
    for plain, with_mask in zip(*found, strict=True):
        torch.testing.assert_close(with_mask, plain)


def test_what_is_impossible_to_the_student_alone_and_all_but_impossible_to_the_teacher_adds_nothing():
    student = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    value = kl_divergence(student, torch.tensor([[0.5, -200.0, 1.0]]))
    value.sum().backward()
    expected = kl_divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]]))
    torch.testing.assert_close(value.detach(), expected)
    assert bool(student.grad.isfinite().all())


def test_a_model_that_answers_nan_is_not_hidden():
    """Only what is masked counts nothing."""
    student, teacher = torch.tensor([[0.0, torch.nan]]), torch.tensor([[0.0, 1.0]])
    assert bool(kl_divergence(student, teacher).isnan())
    assert bool(kl_divergence(teacher, student).isnan())
