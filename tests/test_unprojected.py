"""Logits that are computed chunk by chunk give the values and gradients of logits that are all computed at once."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hf_distill import unprojected
from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.losses import HardLabelLoss, LogitMSELoss, LossTerms, RankingLoss, SoftTargetLoss
from hf_distill.unprojected import UnprojectedLogits, sum_over_chunks

V, TOKENS = 23, 50
T, BETA, SMOOTHING = 2.0, 0.3, 0.1
NO_TEACHER = lambda rows: None  # noqa: E731


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def expected_soft(divergence, ours, theirs):
    """From the definitions, in float64."""
    theirs, ours = ((z.double()[:, : theirs.shape[1]] / T).log_softmax(-1) for z in (theirs, ours))
    mixture = (BETA * theirs.exp() + (1 - BETA) * ours.exp()).log()
    values = {
        "forward_kl": lambda: kl(theirs, ours),
        "reverse_kl": lambda: kl(ours, theirs),
        "jensen_shannon": lambda: BETA * kl(theirs, mixture) + (1 - BETA) * kl(ours, mixture),
    }
    return values[divergence]() * T**2


@dataclasses.dataclass
class Case:
    """Five rows of ten tokens, some of them masked, for heads of widths 6 and 9."""

    student: UnprojectedLogits
    teacher: UnprojectedLogits
    batch: Batch

    def leaves(self):
        return [x for x in (self.student.hidden, self.student.weight, self.student.bias) if x is not None]

    def logits(self, over="labels"):
        """Both models' logits at the positions that count, by hand."""
        where = self.batch.masks[over]
        for head in (self.student, self.teacher):
            z = head.hidden.double() @ head.weight.double().T + (0.0 if head.bias is None else head.bias.double())
            z = z * head.scale
            yield (z if head.softcap is None else head.softcap * (z / head.softcap).tanh())[where]


def make(labelled=True, dtype=torch.float32, teacher_classes=V, bias=True, **head):
    torch.manual_seed(0)

    def logits(width, classes, learns):
        sizes = [(5, 10, width), (classes, width)] + [(classes,)] * bias
        tensors = [torch.randn(size).to(dtype).requires_grad_(learns) for size in sizes]
        return UnprojectedLogits(*tensors, *[None] * (not bias), **head)

    ids = torch.randint(0, V, (5, 10))
    labels = ids.masked_fill((torch.rand(5, 10) < 0.3) | (not labelled), -100)
    batch = Batch.from_inputs({"input_ids": ids, "labels": labels}, Head("masked_lm"))
    return Case(logits(6, V, True), logits(9, teacher_classes, False), batch)


def terms(divergence):
    soft = SoftTargetLoss(temperature=T, divergence=divergence, beta=BETA, weight=0.7)
    return LossTerms({"soft": soft, "hard": HardLabelLoss(weight=0.4, label_smoothing=SMOOTHING)})


def total_and_gradients(losses, case):
    values = losses(Activations(case.student), Activations(case.teacher), case.batch)
    return values, torch.autograd.grad(losses.total(values), case.leaves())


def assert_close(ours, theirs, relative=1e-5):
    assert (ours - theirs).norm() <= relative * theirs.norm()


@pytest.fixture
def eight_chunks(monkeypatch):
    monkeypatch.setattr(unprojected, "CHUNK", 7 * V + 1)  # 50 positions in chunks of 7
    monkeypatch.setattr(unprojected, "CACHED", 3 * V + 1)  # and these in parts of 3


OPTIONS = {
    "plain": {}, "without bias": {"bias": False}, "scale": {"scale": 0.25}, "soft-capping": {"softcap": 3.0},
    "both": {"scale": 2.0, "softcap": 3.0}, "vocabularies differ in padding": {"teacher_classes": V - 4},
}  # fmt: skip


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients_are_those_of_the_definitions(option, divergence, eight_chunks):
    case = make(**OPTIONS[option])
    values, gradients = total_and_gradients(terms(divergence), case)
    ours, theirs = case.logits()
    labels, count = case.batch.labels[case.batch.masks["labels"]], case.batch.masks["labels"].sum()
    soft = expected_soft(divergence, ours, theirs) / count
    hard = F.cross_entropy(ours, labels, label_smoothing=SMOOTHING)
    assert_close(values["soft"], soft)
    assert_close(values["hard"], hard)
    for mine, other in zip(gradients, torch.autograd.grad(0.7 * soft + 0.4 * hard, case.leaves()), strict=True):
        assert_close(mine, other)


def expected_ranking(ours, theirs, k):
    """RankNet's pairs one by one, in float64."""
    best = theirs.topk(k).indices
    rows, places = torch.arange(len(best)), [(i, j) for i in range(k) for j in range(i + 1, k)]
    values = []
    for i, j in places:
        p, q = (((z[rows, best[:, i]] - z[rows, best[:, j]]) / T).sigmoid() for z in (theirs, ours))
        values.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return torch.stack(values).mean() * T**2


@pytest.mark.parametrize("option", ["plain", "both", "vocabularies differ in padding"])
@pytest.mark.parametrize(
    "loss", [LogitMSELoss(weight=0.7), RankingLoss(T, top_k=4, weight=0.7)], ids=["mse", "ranking"]
)
def test_other_losses_on_single_positions_are_swept_too(loss, option, eight_chunks):
    case, losses = make(**OPTIONS[option]), LossTerms({"loss": loss})
    assert losses.by_position()
    values, gradients = total_and_gradients(losses, case)
    ours, theirs = case.logits()
    ours = ours[:, : theirs.shape[1]]
    expected = (ours - theirs).square().mean() if isinstance(loss, LogitMSELoss) else expected_ranking(ours, theirs, 4)
    assert_close(values["loss"], expected)
    for mine, other in zip(gradients, torch.autograd.grad(0.7 * expected, case.leaves()), strict=True):
        assert_close(mine, other)


def test_positions_may_differ_between_terms(eight_chunks):
    """Hard labels at some positions, soft targets at all of them."""
    case = make()
    losses = LossTerms({"soft": SoftTargetLoss(temperature=T, positions="all"), "hard": HardLabelLoss()})
    values, gradients = total_and_gradients(losses, case)
    soft = expected_soft("forward_kl", *case.logits("all_predictions")) / 50
    hard = F.cross_entropy(next(case.logits()), case.batch.labels[case.batch.masks["labels"]])
    assert_close(values["soft"], soft)
    assert_close(values["hard"], hard)
    for mine, other in zip(gradients, torch.autograd.grad(soft + hard, case.leaves()), strict=True):
        assert_close(mine, other)


def test_chunks_without_any_label_count_for_nothing_but_the_soft_targets(eight_chunks):
    """The hard labels of two whole chunks of seven are missing."""
    case = make()
    labels = case.batch.labels.clone()
    labels.view(-1)[7:21] = -100
    case.batch = Batch.from_inputs({"input_ids": labels.clamp(min=0), "labels": labels}, Head("masked_lm"))
    losses = LossTerms({"soft": SoftTargetLoss(temperature=T, positions="all"), "hard": HardLabelLoss()})
    values, gradients = total_and_gradients(losses, case)
    soft = expected_soft("forward_kl", *case.logits("all_predictions")) / 50
    hard = F.cross_entropy(next(case.logits("all_predictions")), labels.view(-1), ignore_index=-100)
    assert_close(values["hard"], hard)
    for mine, other in zip(gradients, torch.autograd.grad(soft + hard, case.leaves()), strict=True):
        assert_close(mine, other)


def test_each_chunk_goes_through_each_head_once_for_all_losses(eight_chunks, monkeypatch):
    """Both terms read the same logits, and the backward pass computes none again."""
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *head: sizes.append(x.shape[-2:]) or linear(x, *head))
    losses = LossTerms({"soft": SoftTargetLoss(positions="all"), "hard": HardLabelLoss()})
    total_and_gradients(losses, make())
    chunks = [7] * 7 + [1]
    assert sizes == [(rows, width) for rows in chunks for width in (6, 9)]


def test_gradcheck():
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((5, 3), (4, 3), (4,))]

    def summed(hidden, weight, bias):
        def both(z, theirs, rows):
            return torch.stack([z.logsumexp(-1).sum(), (z.softmax(-1)[:, 2] ** 2).sum()])

        student = UnprojectedLogits(hidden, weight, bias, 0.5, 3.0)
        return sum_over_chunks(both, student, NO_TEACHER, [0.3, 2.0], chunk=2 * 4) @ torch.tensor([0.6, 4.0]).double()

    assert torch.autograd.gradcheck(summed, leaves)


@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("rows_at_a_time", [1, 7, 50, 1000])
def test_any_number_of_tokens_in_chunks_of_any_size(tokens, rows_at_a_time):
    hidden, weight = torch.randn(tokens, 6, requires_grad=True), torch.randn(V, 6, requires_grad=True)
    count = lambda z, theirs, rows: torch.stack([z.sum(), z.square().sum()])  # noqa: E731
    summed = sum_over_chunks(count, UnprojectedLogits(hidden, weight), NO_TEACHER, [1.0, 0.5], rows_at_a_time * V)
    z = hidden @ weight.T
    torch.testing.assert_close(summed, torch.stack([z.sum(), z.square().sum()]), rtol=1e-4, atol=1e-3)
    ours = torch.autograd.grad(summed[0] + 0.5 * summed[1], (hidden, weight))
    theirs = torch.autograd.grad(z.sum() + 0.5 * z.square().sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_labelled_is_a_zero_with_a_gradient():
    case = make(labelled=False)
    values, gradients = total_and_gradients(terms("forward_kl"), case)
    assert all(value == 0 for value in values.values())
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient(frozen, eight_chunks, monkeypatch):
    shapes, zeros = [], unprojected._zeros
    monkeypatch.setattr(unprojected, "_zeros", lambda x: shapes.append(x.shape) or zeros(x))
    case = make()
    _, everything = total_and_gradients(terms("forward_kl"), case)
    shapes.clear()
    getattr(case.student, frozen).requires_grad_(False)
    losses = terms("forward_kl")
    losses.total(losses(Activations(case.student), Activations(case.teacher), case.batch)).backward()
    assert len(shapes) == 2
    for name, gradient in zip(("hidden", "weight", "bias"), everything, strict=True):
        ours = getattr(case.student, name).grad
        assert (ours is None) == (name == frozen)
        if ours is not None:
            assert_close(ours, gradient, 1e-6)


def test_nothing_is_differentiated_in_evaluation(eight_chunks, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    case = make()
    with torch.no_grad():
        values = terms("forward_kl")(Activations(case.student), Activations(case.teacher), case.batch)
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_reduced_precision_accumulates_in_fp32(dtype, bound, monkeypatch):
    """Against the same numbers in fp32; 50 chunks in which one would lose small gradients."""
    monkeypatch.setattr(unprojected, "CHUNK", V)
    case = make(dtype=dtype)
    exact = dataclasses.replace(
        case,
        student=UnprojectedLogits(*(x.detach().float().requires_grad_() for x in case.leaves())),
        teacher=UnprojectedLogits(*(x.float() for x in (case.teacher.hidden, case.teacher.weight, case.teacher.bias))),
    )
    many = dict.fromkeys(case.batch.totals, torch.tensor(10**7))  # as in a large window: gradients of 1e-7
    case.batch = exact.batch = dataclasses.replace(case.batch, totals=many)
    losses = terms("forward_kl")
    with torch.no_grad():
        values = losses(Activations(case.student), Activations(case.teacher), case.batch)
    reference, gradients = total_and_gradients(losses, exact)
    for name, value in values.items():
        assert value.dtype == torch.float32
        assert_close(value, reference[name], bound)
    # fp16 itself could not hold them: the sum is scaled up before the backward pass, as by a gradient scaler.
    scaled = losses.total(losses(Activations(case.student), Activations(case.teacher), case.batch)) * 2**16
    for ours, theirs in zip(torch.autograd.grad(scaled, case.leaves()), gradients, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.float() / 2**16, theirs, 2 * bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_chunks_add_up_to_their_number(dtype):
    """Counted in bf16 they would stop at 256, in fp16 at 2048: the largest numbers to which one can be added there."""
    hidden, weight, bias = (torch.ones(size, dtype=dtype, requires_grad=True) for size in ((4096, 2), (3, 2), (3,)))
    student = UnprojectedLogits(hidden, weight, bias)
    summed = sum_over_chunks(lambda z, theirs, rows: z.sum()[None], student, NO_TEACHER, [1.0], chunk=3)
    assert summed.item() == 4096 * 3 * 3
    for gradient in torch.autograd.grad(summed.sum(), (weight, bias)):
        assert bool((gradient == 4096).all())


def test_other_weights_than_promised_are_an_error():
    case = make()
    values = terms("forward_kl")(Activations(case.student), Activations(case.teacher), case.batch)
    with pytest.raises(RuntimeError, match="were to be summed with the weights"):
        (values["soft"] + values["hard"]).backward()


def test_a_common_factor_scales_the_gradient():
    case = make()
    _, once = total_and_gradients(terms("forward_kl"), case)
    losses = terms("forward_kl")
    values = losses(Activations(case.student), Activations(case.teacher), case.batch)
    for ours, theirs in zip(torch.autograd.grad(-3 * losses.total(values), case.leaves()), once, strict=True):
        assert_close(ours, -3 * theirs, 1e-6)


def test_a_loss_says_anew_that_it_reads_position_by_position():
    class Coupled(SoftTargetLoss):
        def forward(self, student, teacher, batch):
            return super().forward(student, teacher, batch).sqrt()

    class Own(SoftTargetLoss):
        by_position = True

        def forward(self, student, teacher, batch):
            return super().forward(student, teacher, batch) * 2

    class Warmer(SoftTargetLoss):
        def __init__(self):
            super().__init__(temperature=9.0)

    class Centred(SoftTargetLoss):
        def compare(self, ours, theirs):
            return super().compare(ours - ours.mean(0), theirs)

    found = {loss.__name__: LossTerms({"soft": loss()}).by_position() for loss in (Coupled, Own, Warmer, Centred)}
    assert found == {"Coupled": False, "Own": True, "Warmer": True, "Centred": False}
