"""Losses on hidden states, against float64 loops over the papers' equations, SciPy and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.special import huber, logsumexp

from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.losses import (
    AttentionLoss,
    CKALoss,
    ContrastiveLoss,
    HiddenStateLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
    SimilarityPreservingLoss,
)
from hf_distill.similarity import (
    info_nce,
    linear_cka,
    relational_angle,
    relational_distance,
    similarity_preserving_distance,
)
from hf_distill.testing import tiny_task

ROWS = Head("rows", num_labels=3, problem_type="single_label_classification")
# Padding on the right, on the left, and none.
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])


def batch_of(mask=MASK, rows=None):
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": mask,
        "labels": torch.zeros(rows or len(mask)).long(),
    }
    return Batch.from_inputs(inputs, ROWS)


def states(width, layers=5, rows=4, seed=0):
    """Hidden states whose padding is NaN: it must not matter."""
    generator = torch.Generator().manual_seed(seed + width)
    values = [torch.randn(rows, 5, width, generator=generator, dtype=torch.float64) for _ in range(layers)]
    padding = MASK.repeat(rows // 4, 1)[..., None] == 0
    return Activations(hidden_states={k: v.masked_fill(padding, torch.nan) for k, v in enumerate(values)})


def value(loss, student, teacher, batch=None):
    loss.setup(student.shapes(), teacher.shapes())
    return loss.double()(student, teacher, batch or batch_of())


FIRST = [0, 2, 0, 1]  # of the rows of MASK


class TestFirstTokens:
    def test_agrees_with_a_loop_over_first_real_tokens(self):
        student, teacher = states(6), states(6, seed=1)
        expected = 0.0
        for row, position in enumerate(FIRST):
            for s, t in ((0, 0), (1, 2)):  # 0 is the embedding output
                a, b = (
                    x[k][row, position].numpy() for x, k in ((student.hidden_states, s), (teacher.hidden_states, t))
                )
                a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
                expected += np.sum((a - b) ** 2) / len(FIRST) / 2
        loss = HiddenStateLoss({0: 0, 1: 2}, distance="normalized_mse", positions="first")
        assert value(loss, student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_choices_of_a_row_are_averaged(self):
        student, teacher = states(6, rows=8), states(6, rows=8, seed=1)
        loss = HiddenStateLoss({1: 1}, positions="first")
        mask = MASK.repeat(2, 1)
        of_eight = value(loss, student, teacher, batch_of(mask))
        choices = {"input_ids": torch.ones(4, 2, 5).long(), "attention_mask": mask.reshape(4, 2, 5)}
        assert value(loss, student, teacher, Batch.from_inputs(choices, ROWS)).item() == pytest.approx(of_eight.item())

    def test_feature_maps_have_no_first_token(self):
        maps = Activations(hidden_states={k: torch.randn(2, 6, 3, 3) for k in range(2)})
        with pytest.raises(ValueError, match="has no first token"):
            value(HiddenStateLoss(positions="first"), maps, maps)

    def test_unknown_positions_are_refused(self):
        with pytest.raises(ValueError, match="positions must be one of"):
            HiddenStateLoss(positions="last")

    def test_the_arguments_build_it(self, make_trainer):
        trainer = make_trainer(tiny_task("token"), hidden_state_weight=1.0, hidden_state_positions="first")
        assert "mse of first tokens" in trainer.losses.equation()


class TestSeveralTeacherLayers:
    def test_hidden_states_learn_from_their_average(self):
        student, teacher = states(6), states(6, seed=1)
        averaged = Activations(
            hidden_states={
                0: teacher.hidden_states[0],
                1: (teacher.hidden_states[1] + teacher.hidden_states[3]) / 2,
                2: teacher.hidden_states[4],
            }
        )
        ours = value(HiddenStateLoss({1: (1, 3), 2: 4}), student, teacher)
        assert ours.item() == pytest.approx(value(HiddenStateLoss({1: 1, 2: 2}), student, averaged).item(), rel=1e-12)

    def test_attention_maps_learn_from_their_average(self):
        maps = [torch.rand(4, 2, 5, 5, dtype=torch.float64) * MASK[:, None, None] for _ in range(4)]
        maps = [m / m.sum(-1, keepdim=True) for m in maps]
        student, teacher = Activations(attentions={1: maps[0]}), Activations(attentions=dict(enumerate(maps[1:], 1)))
        average = Activations(attentions={1: sum(maps[1:]) / 3})
        for distance in ("mse", "kl"):
            ours = value(AttentionLoss({1: (1, 2, 3)}, distance=distance), student, teacher)
            expected = value(AttentionLoss({1: 1}, distance=distance), student, average)
            assert ours.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_layers_of_different_shape_are_refused(self):
        teacher = Activations(
            hidden_states={0: torch.randn(4, 5, 6), 1: torch.randn(4, 5, 6), 2: torch.randn(4, 5, 8)}
        )
        with pytest.raises(ValueError, match=r"averages the teacher layers \(1, 2\), but their shapes differ"):
            value(HiddenStateLoss({1: (1, 2)}), states(6, layers=2), teacher)


def pooled_by_hand(activations, index, pooling):
    """A loop over rows; NaN in the padding must never be touched."""
    rows = []
    for row, mask in zip(activations.hidden_states[index], MASK, strict=True):
        real = [row[i].detach().numpy() for i in range(5) if mask[i]]
        rows.append(real[0] if pooling == "first" else np.mean(real, axis=0))
    return np.stack(rows)


def cka_by_hand(x, y):
    """HSIC with the centring matrix, as the paper writes it."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, l = x @ x.T, y @ y.T  # noqa: E741

    def hsic(a, b):
        return np.trace(a @ centre @ b @ centre) / (n - 1) ** 2

    return 1 - hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def similarity_preserving_by_hand(x, y):
    def gram(a):
        g = np.array([[float(np.dot(p, q)) for q in a] for p in a])
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    return np.linalg.norm(gram(x) - gram(y), "fro") ** 2 / len(x) ** 2


def distances_by_hand(x, y):
    def relative(a):
        return pdist(a) / np.mean(pdist(a))

    return np.mean([huber(1.0, d) for d in relative(x) - relative(y)])


def _cosine(a, i, j, k):
    p, q = a[i] - a[j], a[k] - a[j]
    return p @ q / np.linalg.norm(p) / np.linalg.norm(q)


def angles_by_hand(x, y):
    triplets = list(itertools.permutations(range(len(x)), 3))
    return np.mean([huber(1.0, _cosine(x, *t) - _cosine(y, *t)) for t in triplets])


def contrastive_by_hand(x, y):
    logits = 1 - cdist(x, y, "cosine")
    return np.mean(logsumexp(logits / 0.1, axis=1) - np.diag(logits) / 0.1)


BY_HAND = {
    CKALoss: cka_by_hand,
    SimilarityPreservingLoss: similarity_preserving_by_hand,
    RelationalDistanceLoss: distances_by_hand,
    RelationalAngleLoss: angles_by_hand,
    ContrastiveLoss: contrastive_by_hand,
}
POOLED = list(BY_HAND)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("loss", POOLED)
class TestRelationsBetweenRows:
    def test_agree_with_the_papers_equations(self, loss, pooling):
        widths = (6, 6) if loss is ContrastiveLoss else (3, 6)
        student, teacher = states(widths[0]), states(widths[1], seed=1)
        expected = np.mean(
            [
                BY_HAND[loss](pooled_by_hand(student, s, pooling), pooled_by_hand(teacher, t, pooling))
                for s, t in ((1, 2), (0, 0))
            ]
        )
        ours = value(loss({1: 2, 0: 0}, pooling), student, teacher)
        assert ours.item() == pytest.approx(expected, rel=1e-9)

    def test_weigh_with_the_share_of_rows(self, loss, pooling):
        """A micro-batch of 4 of 16 rows counts a quarter of what it is by itself."""
        student, teacher = states(6), states(6, seed=1)
        batch = batch_of()
        quarter = value(loss({1: 2}, pooling), student, teacher, batch.with_counts(4 * batch.counts()))
        assert 4 * quarter.item() == pytest.approx(value(loss({1: 2}, pooling), student, teacher).item(), rel=1e-12)

    def test_one_row_is_a_zero_with_a_gradient(self, loss, pooling):
        student, teacher = (
            Activations(hidden_states={0: states(w).hidden_states[0][2:3].requires_grad_()}) for w in (6, 6)
        )
        zero = value(loss({0: 0}, pooling), student, teacher, batch_of(MASK[2:3]))
        assert zero.item() == 0
        assert torch.autograd.grad(zero, student.hidden_states[0])[0].abs().sum() == 0

    def test_copies_of_other_processes_do_not_count(self, loss, pooling):
        student, teacher = states(6), states(6, seed=1)
        part = [Activations(hidden_states={0: a.hidden_states[0][:3]}) for a in (student, teacher)]
        expected = value(loss({0: 0}, pooling), *part, batch_of(MASK[:3]))
        assert value(loss({0: 0}, pooling), student, teacher, batch_of().first_rows(3)).item() == pytest.approx(
            expected.item()
        )


MATHS = {
    "cka": lambda x, y: 1 - linear_cka(x, y),
    "similarity preserving": similarity_preserving_distance,
    "distances": relational_distance,
    "angles": relational_angle,
    "contrastive": lambda x, y: info_nce(x, y).mean(),
}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("name", MATHS)
class TestMaths:
    def test_gradients_agree_with_finite_differences(self, name, rows):
        assert torch.autograd.gradcheck(MATHS[name], (rows[0].requires_grad_(), rows[1]))

    @pytest.mark.parametrize("wide", [False, True])
    def test_unchanged_by_the_teachers_scale_and_rotation(self, name, rows, wide):
        """All but the contrastive one compare relations alone, and a rotation keeps them."""
        x, y = rows
        if wide:  # the other of CKA's two ways to the same number
            x, y = torch.cat([x, x.square()], 1), torch.cat([y, y.square()], 1)
        rotation = torch.linalg.qr(torch.randn(y.shape[1], y.shape[1], dtype=torch.float64))[0]
        moved = 3.7 * y if name == "contrastive" else 3.7 * y @ rotation
        if name in ("cka", "distances", "angles"):
            moved = moved + 5
        assert MATHS[name](x, moved).item() == pytest.approx(MATHS[name](x, y).item(), rel=1e-9)

    def test_zero_at_identity_and_above_elsewhere(self, name, rows):
        x, y = rows
        if name == "contrastive":  # its least value is that of rows at right angles
            x = torch.eye(7, dtype=torch.float64)
            assert MATHS[name](x, 2 * x).item() == pytest.approx(np.log(np.exp(10) + 6) - 10, rel=1e-9)
            return
        assert MATHS[name](x, x).item() == pytest.approx(0, abs=1e-12)
        assert MATHS[name](x, y).item() > 1e-3

    def test_equal_rows_have_finite_gradients(self, name):
        x = torch.ones(5, 3).requires_grad_()
        (gradient,) = torch.autograd.grad(MATHS[name](x, torch.randn(5, 3)), x)
        assert gradient.isfinite().all()

    def test_large_states_do_not_overflow(self, name, rows):
        x, y = (1e4 * side.float().repeat(1, 200) for side in rows)
        assert MATHS[name](x, y).item() == pytest.approx(MATHS[name](x.double(), y.double()).item(), rel=1e-3)

    def test_other_rows_are_refused(self, name, rows):
        with pytest.raises(ValueError, match=r"got \(7, 4\) and \(6, 4\)"):
            MATHS[name](rows[0], rows[1][:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_the_student_cannot_tell_apart_have_a_gradient_of_ordinary_size(dtype):
    """As where a word is missing from a trimmed vocabulary; at equal rows an angle has no derivative."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 8, generator=generator, dtype=dtype) for _ in range(2))
    student[1] = student[0]
    student.requires_grad_()
    value = relational_angle(student, teacher)
    value.backward()
    assert student.grad.abs().max() < 1
    with np.errstate(invalid="ignore"):  # 0 / 0, where there is no direction: the cosine counts as 0
        cosines = [
            np.nan_to_num([_cosine(x.detach().double().numpy(), *t) for t in itertools.permutations(range(6), 3)])
            for x in (student, teacher)
        ]
    assert value.item() == pytest.approx(np.mean(huber(1.0, cosines[0] - cosines[1])), rel=1e-5)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        ContrastiveLoss(temperature=0.0)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling must be one of"):
        CKALoss(pooling="max")


@pytest.mark.parametrize("name", ["token", "image"])
def test_relations_are_learned(name, make_trainer):
    """Each term falls, with models of unequal width."""
    losses = {
        "cka": CKALoss(weight=3.0), "sp": SimilarityPreservingLoss(weight=10.0), "distances": RelationalDistanceLoss(),
        "angles": RelationalAngleLoss(weight=3.0), "contrastive": ContrastiveLoss(pooling="first"),
    }  # fmt: skip
    trainer = make_trainer(tiny_task(name, rows=16), losses=losses, max_steps=15)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    ratios = {term: after[f"eval_{term}_loss"] / before[f"eval_{term}_loss"] for term in losses}
    assert max(ratios.values()) < 0.9, ratios
