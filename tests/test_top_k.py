"""Distributions of which only the likeliest classes and the sum of the rest are known."""

import math

import pytest
import torch

from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.functional import grouped_log_probabilities
from hf_distill.losses import HardLabelLoss, LossTerms, SoftTargetLoss
from hf_distill.top_k import TopKLogits
from hf_distill.unprojected import UnprojectedLogits


def by_hand(ours, theirs, k, temperature):
    """Sum of KL(p || q) over k + 1 outcomes, both softened, times temperature squared: a float64 loop."""
    total = torch.zeros((), dtype=torch.float64)
    for z, t in zip(ours.double(), theirs.double(), strict=True):
        p, q = t.softmax(-1), z.softmax(-1)
        chosen = sorted(range(len(p)), key=lambda c: -p[c])[:k]
        others = [c for c in range(len(p)) if c not in chosen]
        outcomes = [[c] for c in chosen] + ([others] if others else [])
        p, q = (torch.stack([sum(x[c] for c in some) for some in outcomes]) for x in (p, q))
        p, q = (x ** (1 / temperature) / (x ** (1 / temperature)).sum() for x in (p, q))
        total = total + temperature**2 * sum(p[i] * (p[i] / q[i]).log() for i in range(len(p)))
    return total


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (2 * torch.randn(6, 11)).requires_grad_(), 2 * torch.randn(6, 11)


def soft_loss(ours, theirs, temperature=1.0):
    labels = torch.zeros(1, 6, dtype=torch.long)
    batch = Batch.from_inputs({"input_ids": labels, "labels": labels}, Head("masked_lm"))
    known = TopKLogits(theirs.log_probabilities[None], theirs.classes[None], theirs.vocabulary)
    return SoftTargetLoss(temperature)(Activations(ours[None]), Activations(known), batch)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 10, 11])
def test_the_loss_is_the_kl_over_k_and_one_outcomes(k, temperature, logits):
    ours, theirs = logits
    value, expected = soft_loss(ours, TopKLogits.of(theirs, k), temperature), by_hand(*logits, k, temperature) / 6
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,), (other,) = (torch.autograd.grad(x, ours) for x in (value, expected))
    torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_are_the_full_kl(temperature, logits):
    ours, theirs = logits
    full = torch.nn.functional.kl_div(
        (ours / temperature).log_softmax(-1), (theirs / temperature).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(soft_loss(ours, TopKLogits.of(theirs, 11), temperature), full * temperature**2)


def test_the_gradient_lacks_only_what_the_teacher_says_about_the_rest(logits):
    """What the docstring of `TopKLogits` says of the bias."""
    ours, theirs = logits
    known = TopKLogits.of(theirs, 4)
    (gradient,) = torch.autograd.grad(6 * soft_loss(ours, known), ours)
    p, q = theirs.softmax(-1), ours.detach().softmax(-1)
    rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, known.classes, False)
    bias = (gradient - (q - p)) * rest
    scaled = q * ((p * rest).sum(-1) / (q * rest).sum(-1))[:, None]
    torch.testing.assert_close(gradient[~rest], (q - p)[~rest], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias, (p - scaled) * rest, rtol=1e-4, atol=1e-6)


def test_gradcheck():
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([[0, 3], [6, 1], [2, 5]])
    assert torch.autograd.gradcheck(lambda z: grouped_log_probabilities(z, classes), z)


def test_a_small_rest_is_precise():
    z = torch.tensor([[30.0, 0.0, 0.0, -3.0]])
    rest = grouped_log_probabilities(z, torch.tensor([[0]]))[0, -1]
    assert rest.item() == pytest.approx(math.log(2 + math.exp(-3)) - 30, rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_some_positions_at_a_time_are_all_positions(divergence, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    known = TopKLogits.of(torch.randn(5, 4, 11), 3)
    ids = torch.randint(0, 11, (5, 4)).masked_fill(torch.rand(5, 4) < 0.3, -100)
    batch = Batch.from_inputs({"input_ids": ids.abs(), "labels": ids}, Head("masked_lm"))
    losses = LossTerms({"soft": SoftTargetLoss(2.0, divergence), "hard": HardLabelLoss(0.3)})
    monkeypatch.setattr("hf_distill.unprojected.CHUNK", 3 * 11)
    results = []
    for student in (UnprojectedLogits(hidden, weight), hidden @ weight.T):
        total = losses.total(losses(Activations(student), Activations(known), batch))
        results.append((total, *torch.autograd.grad(total, (hidden, weight))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_class_that_the_student_has_not_is_an_error():
    with pytest.raises(ValueError, match="likeliest classes is 10, but the student has only 9"):
        TopKLogits.of(torch.arange(11.0)[None], 2).first_classes(9)
