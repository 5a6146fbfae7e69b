"""The losses on answers against SciPy and scikit-learn, and what they owe the trainer."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr, zscore
from sklearn.metrics import mean_squared_error as sklearn_mean_squared_error
from test_functional import logits, numpy64
from test_response_functional import oracle_decoupled, oracle_ranking, probabilities

from hf_distill import losses
from hf_distill.activations import Activations, Head, Needs
from hf_distill.batch import Batch
from hf_distill.functional import (
    skewed_kl_divergence,
)
from hf_distill.losses import (
    DecoupledLoss,
    DistillationLoss,
    DISTLoss,
    LogitMSELoss,
    RankingLoss,
    SoftTargetLoss,
)
from hf_distill.losses.base import LossTerms
from hf_distill.losses.soft_target import DIVERGENCES
from hf_distill.testing import check_loss

VARIANTS = {
    **{f"soft {name}": SoftTargetLoss(divergence=name) for name in DIVERGENCES},
    **{f"standardized {name}": SoftTargetLoss(divergence=name, standardize=True) for name in DIVERGENCES},
    "skew 0.5": SoftTargetLoss(divergence="skewed_kl", skew=0.5, temperature=4.0),
    "logits everywhere": LogitMSELoss(positions="all"),
    "dist hot": DISTLoss(temperature=4.0, inter_class_weight=2.0, positions="all"),
    "dist rows": DISTLoss(intra_class_weight=0.0),
    "dist columns": DISTLoss(inter_class_weight=0.0),
    "dkd hot": DecoupledLoss(temperature=4.0, beta=8.0),
    "dkd target alone": DecoupledLoss(temperature=1.0, beta=0.5),
    "ranking a pair": RankingLoss(temperature=2.0, top_k=2, positions="all"),
}
# How to build the losses that have no defaults.
BUILT: dict[str, DistillationLoss] = {"AttentionRelationLoss": losses.AttentionRelationLoss(relation_heads=2)}
PUBLIC = [
    name
    for name in losses.__all__
    if inspect.isclass(getattr(losses, name))
    and issubclass(getattr(losses, name), DistillationLoss)
    and name not in ("DistillationLoss", "PooledLoss")  # what others derive from
]


LOSSES = {**{name: BUILT.get(name) or getattr(losses, name)() for name in PUBLIC}, **VARIANTS}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_keeps_what_every_loss_owes_the_trainer(name):
    """Every public one, so that a new loss cannot be forgotten."""
    check_loss(LOSSES[name])


def test_the_equation_of_a_regression_says_squared_error():
    terms = LossTerms({"soft": SoftTargetLoss(3.0), "logits": LogitMSELoss(weight=0.5)})
    assert terms.equation("regression") == "1 * soft[squared error] + 0.5 * logits[mse of logits]"
    assert terms.equation("single_label_classification") == "1 * soft[forward_kl, T=3] + 0.5 * logits[mse of logits]"


@pytest.mark.parametrize("name", [n for n, x in LOSSES.items() if x.teacher_needs == Needs(logits=True)])
def test_bf16_answers_move_the_loss_by_their_own_rounding_only(name):
    """bf16 keeps 8 bits: a relative error of 2^-9 in each of 600 logits."""
    student, teacher = (x.reshape(20, 6, 5) for x in torch.randn(2, 600, generator=torch.Generator().manual_seed(0)))
    inputs = {"input_ids": torch.ones(20, 6, dtype=torch.long), "labels": torch.arange(120).reshape(20, 6) % 5}
    batch = Batch.from_inputs(inputs, Head("tokens"))
    exact, rounded = (
        LOSSES[name](Activations(student.to(dtype)), Activations(teacher.to(dtype)), batch).item()
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert rounded == pytest.approx(exact, rel=5e-3)


def rows(student, teacher, labels=None):
    """Both sides as one batch of rows."""
    inputs = {"pixel_values": torch.zeros(len(student), 1)}
    if labels is not None:
        inputs["labels"] = labels
    head = Head("rows", student.shape[-1], "single_label_classification")
    return Activations(student), Activations(teacher), Batch.from_inputs(inputs, head)


def test_dist_is_rows_and_columns_of_scipys_correlations():
    student, teacher = logits("few classes", torch.float32)
    q, p = probabilities(student, teacher, 2.0)
    inter = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q.T, p.T, strict=True)])
    for weights in ((1.0, 1.0), (2.0, 0.0), (0.0, 3.0)):
        ours = DISTLoss(2.0, *weights)(*rows(student, teacher))
        assert ours.item() == pytest.approx(weights[0] * inter + weights[1] * intra, rel=1e-5)


def test_dist_sees_the_columns_of_a_vocabulary_however_improbable():
    """Probabilities of 1e-20, whose squares are 0 in fp32, still correlate."""
    teacher = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    teacher[:, 3:] -= 46.0
    student = teacher + 0.5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    q, p = probabilities(student, teacher, 1.0)
    assert p[:, 3:].max() < 1e-18
    intra = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q.T, p.T, strict=True)])
    assert DISTLoss(1.0, 0.0)(*rows(student, teacher)).item() == pytest.approx(intra, rel=1e-4)


def test_gradient_of_dist_does_not_fall_as_it_gets_hot():
    """Why its value has no temperature²."""
    norms = []
    for temperature in (50.0, 500.0):
        student, teacher = logits("few classes", torch.float64)
        student.requires_grad_()
        DISTLoss(temperature)(*rows(student, teacher)).backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.parametrize("loss", [DISTLoss(), SoftTargetLoss(standardize=True)])
def test_a_student_that_says_the_same_of_everything_gets_a_finite_gradient(loss):
    """A head that starts at zero: no correlation and no z-score is defined there."""
    student, teacher = torch.zeros(16, 5, requires_grad=True), logits("few classes", torch.float32)[1]
    value = loss(*rows(student, teacher))
    value.backward()
    assert value > 0.1
    assert student.grad.isfinite().all()


def test_micro_batches_of_dist_are_averaged_by_their_positions():
    student, teacher = logits("few classes", torch.float64)
    loss, whole = DISTLoss(), rows(student, teacher)[2]
    parts = [slice(0, 10), slice(10, 15), slice(15, 16)]  # the last has one row, and no columns to correlate
    alone, shares = [], []
    for part in parts:
        ours, theirs, batch = rows(student[part], teacher[part])
        alone.append(loss(ours, theirs, batch).item())
        shares.append(loss(ours, theirs, batch.with_counts(whole.counts())).item())
    assert sum(shares) == pytest.approx(np.average(alone, weights=[10, 5, 1]), rel=1e-9)
    inter = DISTLoss(intra_class_weight=0.0)
    assert alone[2] == pytest.approx(inter(*rows(student[15:], teacher[15:])).item())
    assert not inter.couples_rows


@pytest.mark.parametrize("name", ["rows", "tokens"])
def test_dkd_is_a_loop_over_the_labelled_positions(name):
    student, teacher = logits("few classes", torch.float32)
    labels = torch.arange(16) % 5
    labels[3] = labels[11] = -100
    kept = labels != -100
    tckd, nckd = oracle_decoupled(student[kept], teacher[kept], labels[kept], 3.0)
    sides = rows(student, teacher, labels)
    if name == "tokens":
        inputs = {"input_ids": torch.ones(4, 4), "labels": labels.reshape(4, 4)}
        shaped = [Activations(x.reshape(4, 4, 5)) for x in (student, teacher)]
        sides = (*shaped, Batch.from_inputs(inputs, Head("tokens")))
    assert DecoupledLoss(3.0, beta=4.0)(*sides).item() == pytest.approx(np.mean(tckd + 4.0 * nckd), rel=1e-5)


def test_ranking_is_a_loop_over_the_teachers_best_classes():
    student, teacher = logits("few classes", torch.float32)
    expected = oracle_ranking(student, teacher, 2.0, top_k=3).mean()
    assert RankingLoss(2.0, top_k=3)(*rows(student, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_logit_mse_is_scikit_learns():
    student, teacher = logits("few classes", torch.float32)
    expected = sklearn_mean_squared_error(numpy64(teacher), numpy64(student))
    assert LogitMSELoss()(*rows(student, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_standardized_soft_targets_are_the_kl_of_z_scores():
    student, teacher = logits("few classes", torch.float32)
    q, p = (softmax(zscore(numpy64(x), axis=-1) / 2.0, axis=-1) for x in (student, teacher))
    expected = np.mean(rel_entr(p, q).sum(-1)) * 4.0
    loss = SoftTargetLoss(2.0, standardize=True)
    assert loss(*rows(student, teacher)).item() == pytest.approx(expected, rel=1e-4)
    assert loss(*rows(9.0 * student, 0.1 * teacher)).item() == pytest.approx(expected, rel=1e-4)


def test_multi_label_heads_compare_label_by_label():
    student, teacher = logits("few classes", torch.float32)
    q, p = expit(numpy64(student) / 2.0), expit(numpy64(teacher) / 2.0)
    inputs = {"pixel_values": torch.zeros(16, 1)}
    batch = Batch.from_inputs(inputs, Head("rows", 5, "multi_label_classification"))
    sides = Activations(student), Activations(teacher), batch
    expected = {
        "total_variation": 2.0 * np.abs(p - q).mean(),
        "skewed_kl": 4.0 * sum(rel_entr(a, 0.1 * a + 0.9 * b) for a, b in ((p, q), (1 - p, 1 - q))).mean(),
    }
    for name, value in expected.items():
        assert SoftTargetLoss(2.0, name)(*sides).item() == pytest.approx(value, rel=1e-4)
    assert LogitMSELoss()(*sides).item() == pytest.approx(sklearn_mean_squared_error(teacher, student), rel=1e-4)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: SoftTargetLoss(divergence="skewed"), "divergence must be one of"),
        (lambda: SoftTargetLoss(skew=1.0), r"skew must lie in \[0, 1\)"),
        (lambda: skewed_kl_divergence(torch.zeros(2), torch.zeros(2), 1.0, -0.1), r"skew must lie in \[0, 1\)"),
        (lambda: DISTLoss(temperature=0.0), "temperature must be a finite number above 0"),
        (lambda: DISTLoss(intra_class_weight=-1.0), "intra_class_weight must be a finite number of at least 0"),
        (lambda: DISTLoss(1.0, 0.0, 0.0), "At least one of inter_class_weight, intra_class_weight"),
        (lambda: DISTLoss(positions="some"), "positions must be one of"),
        (lambda: DecoupledLoss(temperature=math.inf), "temperature must be a finite number above 0"),
        (lambda: DecoupledLoss(beta=math.nan), "beta must be a finite number"),
        (lambda: RankingLoss(top_k=1), "top_k must be at least 2"),
        (lambda: RankingLoss(temperature=-1.0), "temperature must be a finite number above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(build, reason):
    with pytest.raises(ValueError, match=reason):
        build()


def test_terms_are_printed_with_what_decides_them():
    assert [loss.formula() for loss in VARIANTS.values()][:6] == [
        "forward_kl, T=2",
        "reverse_kl, T=2",
        "jensen_shannon, T=2, beta=0.5",
        "skewed_kl, T=2, skew=0.1",
        "skewed_reverse_kl, T=2, skew=0.1",
        "total_variation, T=2",
    ]
    assert SoftTargetLoss(standardize=True).formula() == "forward_kl, T=2, standardized"
    assert [loss().formula() for loss in (LogitMSELoss, DISTLoss, DecoupledLoss, RankingLoss)] == [
        "mse of logits",
        "DIST, T=1, inter-class=1, intra-class=1",
        "DKD, T=2, beta=1",
        "pairwise ranking, T=1, top_k=16",
    ]


def test_each_source_is_cited():
    plain, rich = SoftTargetLoss(), SoftTargetLoss(divergence="skewed_reverse_kl", standardize=True)
    assert plain.citation.count("@") == 1
    assert ["ko2024" in rich.citation, "sun2024" in rich.citation, "hinton2015" in rich.citation] == [True] * 3
    assert all(loss().citation.startswith("@") for loss in (LogitMSELoss, DISTLoss, DecoupledLoss, RankingLoss))


@pytest.mark.parametrize("gap", [60.0, 95.0, 100.0, 103.0, 200.0])
def test_a_class_that_is_all_but_impossible_in_every_row_leaves_dist_a_gradient(gap):
    student = torch.tensor([[gap, 0.0, 1.0], [gap + 1, 0.5, 0.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    value = DISTLoss().compare(student, teacher).sum()
    value.backward()
    assert value.isfinite()
    assert bool(student.grad.isfinite().all())
