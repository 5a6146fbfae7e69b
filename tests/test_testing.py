"""`check_loss` passes our losses and catches the ways in which losses usually go wrong."""

import pytest
import torch
from torch.nn import functional as torch_functional

from hf_distill.activations import Needs
from hf_distill.functional import kl_divergence
from hf_distill.losses import (
    AttentionLoss,
    AttentionRelationLoss,
    CKALoss,
    ContrastiveLoss,
    DistillationLoss,
    HardLabelLoss,
    HiddenStateLoss,
    LELPLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
)
from hf_distill.testing import TASKS, check_loss, tiny_task

OURS = {
    "hard": HardLabelLoss(),
    "smoothed": HardLabelLoss(label_smoothing=0.1),
    "soft": SoftTargetLoss(),
    "hot": SoftTargetLoss(temperature=10.0),
    "reverse": SoftTargetLoss(divergence="reverse_kl"),
    "jsd": SoftTargetLoss(divergence="jensen_shannon"),
    "jsd 0.1": SoftTargetLoss(divergence="jensen_shannon", beta=0.1),
    "all positions": SoftTargetLoss(positions="all"),
    "hidden": HiddenStateLoss(),
    "hidden last": HiddenStateLoss("last"),
    "hidden normalized": HiddenStateLoss({0: 0, -1: -1}, distance="normalized_mse"),
    "hidden cosine": HiddenStateLoss({1: 2}, distance="cosine"),
    "relations": AttentionRelationLoss("uniform", relation_heads=2),
    "relations of attention": AttentionRelationLoss(relations=("attention", "values"), relation_heads=1),
    "cka": CKALoss(),
    "similarity preserving": SimilarityPreservingLoss({1: (1, 2)}),
    "distances": RelationalDistanceLoss(pooling="first"),
    "angles": RelationalAngleLoss(),
    "contrastive": ContrastiveLoss("uniform"),
    "contrastive first": ContrastiveLoss(pooling="first"),
    "hidden first": HiddenStateLoss(positions="first"),
    "hidden averaged": HiddenStateLoss({1: (1, 2)}),
    "attention averaged": AttentionLoss({2: (1, 2)}),
    "attention": AttentionLoss(),
    "attention kl": AttentionLoss("last", distance="kl"),
    "lelp": LELPLoss(subclasses=3),
    "lelp mean": LELPLoss(subclasses=2, pooling="mean", outside_logits=False),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_losses_pass(name):
    # Smoothing over the classes of a span is smoothing over padding; the trainer refuses it.
    check_loss(OURS[name], **({"kinds": ("rows", "tokens", "causal_lm")} if name == "smoothed" else {}))


class LogitDistance(DistillationLoss):
    """The example of `DistillationLoss`, as a user would write it."""

    student_needs = teacher_needs = Needs(logits=True)

    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return batch.mean(self.distance(ours.float(), theirs.float()))

    def distance(self, ours, theirs):
        return (ours - theirs).square().mean(-1)


def test_a_users_own_loss_passes():
    """Not on spans: there a mean over the classes is one over padding too."""
    check_loss(LogitDistance(), kinds=("rows", "multi_label", "regression", "tokens", "masked_lm", "causal_lm"))
    with pytest.raises(AssertionError, match="kind 'span' the loss changes when padding is added"):
        check_loss(LogitDistance(), kinds=("span",))


class MeansByItself(LogitDistance):
    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return kl_divergence(ours, theirs).mean()


class MeansOverPadding(LogitDistance):
    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean()


class SumsAndDividesByItsOwnCount(LogitDistance):
    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return kl_divergence(ours, theirs).sum() / len(ours)


class Sums(LogitDistance):
    """Adds up over micro-batches, but is no mean: nothing here can tell, and a user may want it."""

    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return kl_divergence(ours, theirs).sum()


class MultipliesByTheMask(LogitDistance):
    """On hidden states, whose padding may hold anything: NaN * 0 is NaN."""

    student_needs = teacher_needs = Needs(hidden_states=True)
    over = "tokens"

    def forward(self, student, teacher, batch):
        mask = batch.masks["tokens"]
        difference = (student.hidden_states[1].mean(-1) - teacher.hidden_states[1].mean(-1)).square()
        return (difference * mask).sum() / batch.totals["tokens"].clamp(min=1)


class MultipliesLogitsByTheMask(LogitDistance):
    def forward(self, student, teacher, batch):
        difference = (student.logits - teacher.logits).square().mean(-1)
        return (difference * batch.masks["predictions"]).sum() / batch.totals["predictions"].clamp(min=1)


class ComputesInBf16(LogitDistance):
    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
        return batch.mean((log_p.exp() * (log_p - log_q)).sum(-1))


class IsDetached(LogitDistance):
    def distance(self, ours, theirs):
        return super().distance(ours.detach(), theirs)


class LearnsTheTeacherAlone(LogitDistance):
    def forward(self, student, teacher, batch):
        return super().forward(teacher, teacher, batch)


class ReturnsOneValueAPosition(LogitDistance):
    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return kl_divergence(ours, theirs)


class IsInfinite(LogitDistance):
    def distance(self, ours, theirs):
        return super().distance(ours, theirs) / 0.0


class HasANanGradient(LogitDistance):
    def distance(self, ours, theirs):
        return super().distance(ours, theirs) + (ours - ours).square().sum(-1).sqrt()


class DividesByNothing(LogitDistance):
    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return kl_divergence(ours, theirs).sum() / batch.totals["predictions"]


class DividesByItsWeights(LogitDistance):
    """Weighs positions by the teacher's confidence and normalises within the micro-batch."""

    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        confidence = theirs.float().softmax(-1).amax(-1)
        return batch.mean(kl_divergence(ours, theirs) * confidence / confidence.mean())


class GuessesThePadding(LogitDistance):
    """Forgets that positions differ and averages rows first: a longer row counts as much as a short one."""

    def forward(self, student, teacher, batch):
        mask = batch.masks["predictions"]
        values = torch.zeros(mask.shape)
        ours, theirs = batch.predictions(student, teacher)
        values = values.masked_scatter(mask, kl_divergence(ours, theirs))
        return (values.sum(-1) / values.shape[-1]).sum() / batch.totals["rows"]


class CouplesRowsInUnequalShares(DistillationLoss):
    """Every micro-batch counts as much, however few rows it has."""

    couples_rows = True

    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        return (ours.float() @ ours.float().T - theirs.float() @ theirs.float().T).square().mean()


class DividesByTheSpread(DistillationLoss):
    couples_rows = True

    def forward(self, student, teacher, batch):
        ours, theirs = (x.float() for x in batch.predictions(student, teacher))
        return batch.mean((ours / ours.std(0) - theirs / theirs.std(0)).square().mean(-1))


WRONG = [
    (CouplesRowsInUnequalShares, ("rows",), "ignores the window's counts"),
    (MeansByItself, ("tokens",), "depends on how the batch is split"),
    (MeansByItself, ("rows",), "depends on how the batch is split"),
    (SumsAndDividesByItsOwnCount, ("causal_lm",), "depends on how the batch is split"),
    (DividesByItsWeights, ("tokens",), "depends on how the batch is split"),
    (MeansOverPadding, ("tokens",), "changes when padding is added"),
    (GuessesThePadding, ("tokens",), "changes when padding is added"),
    (MultipliesByTheMask, ("rows",), "changes when padding is added"),
    (MultipliesLogitsByTheMask, ("tokens",), "changes when padding is added"),
    (ComputesInBf16, ("rows",), "computes in bf16; cast to fp32 first"),
    (ComputesInBf16, ("tokens",), "computes in bf16; cast to fp32 first"),
    (DividesByNothing, ("tokens",), "when everything is masked"),
    (ReturnsOneValueAPosition, ("tokens",), "must return one finite number"),
    (IsInfinite, ("tokens",), "must return one finite number"),
    (HasANanGradient, ("tokens",), "has a gradient that is not finite"),
    (IsDetached, ("tokens",), "must give the student a gradient"),
    (LearnsTheTeacherAlone, ("tokens",), "must give the student a gradient"),
]


@pytest.mark.parametrize(("loss", "kinds", "message"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_loss_is_caught_and_told_why(loss, kinds, message):
    with pytest.raises(AssertionError, match=f"kind '{kinds[0]}' the loss .*{message}"):
        check_loss(loss(), kinds=kinds)


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
def test_a_loss_that_fails_on_a_single_row_is_caught():
    with pytest.raises(AssertionError, match="on a single row"):
        check_loss(DividesByTheSpread(), kinds=("rows",))


@pytest.mark.parametrize("loss", dict.fromkeys(entry[0] for entry in WRONG), ids=lambda loss: loss.__name__)
def test_a_wrong_loss_is_caught_without_naming_kinds_too(loss):
    with pytest.raises(AssertionError, match="On a head of kind"):
        check_loss(loss(), kinds=("tokens", "causal_lm"))


class CouplesRows(DistillationLoss):
    """Similarities between the rows of a micro-batch, told honestly."""

    student_needs = teacher_needs = Needs(logits=True)
    over = "rows"
    couples_rows = True

    def forward(self, student, teacher, batch):
        ours, theirs = batch.predictions(student, teacher)
        grams = [torch_functional.normalize(x.float(), dim=-1) for x in (ours, theirs)]
        difference = grams[0] @ grams[0].T - grams[1] @ grams[1].T
        return batch.mean(difference.square().sum(-1))


def test_a_loss_that_says_it_couples_rows_is_not_split():
    check_loss(CouplesRows(), kinds=("rows", "tokens"))


def test_a_loss_that_couples_rows_without_saying_so_is_caught():
    loss = CouplesRows()
    loss.couples_rows = False
    with pytest.raises(AssertionError, match="depends on how the batch is split"):
        check_loss(loss, kinds=("rows",))


def test_the_check_leaves_random_numbers_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_loss(SoftTargetLoss())
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", TASKS)
def test_a_users_own_loss_trains(name, make_trainer):
    task = tiny_task(name, rows=32)
    losses = {"distance": LogitDistance(weight=0.3)}
    trainer = make_trainer(
        task, losses=losses, eval_dataset=task.rows, max_steps=8, logging_strategy="steps", logging_steps=1
    )
    before = trainer.evaluate()["eval_distance_loss"]
    trainer.train()
    logged = [line for line in trainer.state.log_history if "distance_loss" in line]
    assert len(logged) == 8
    assert all(line["loss"] == pytest.approx(0.3 * line["distance_loss"], rel=1e-3, abs=1e-4) for line in logged)
    assert trainer.evaluate()["eval_distance_loss"] < before


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="name must be one of"):
        tiny_task("translation")


@pytest.mark.parametrize("name", TASKS)
def test_tiny_tasks_repeat(name):
    first, second = tiny_task(name, rows=3), tiny_task(name, rows=3)
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True))
    ours, theirs = first.collate(first.rows), second.collate(second.rows)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
