"""A layer mapping proposed from data."""

import itertools

import numpy as np
import pytest
import torch

from hf_distill import create_student
from hf_distill.layer_proposal import LayerProposal, _best_in_order, propose_layer_mapping
from hf_distill.mapping import LayerMapping
from hf_distill.similarity import debiased_cka
from hf_distill.testing import tiny_task


def unbiased_hsic(k, l):  # noqa: E741
    """Song et al., 2012, equation 5, as it is written."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    return (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one
    ) / (n * (n - 3))


def test_debiased_cka_agrees_with_the_unbiased_estimator():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [torch.randn(9, w, generator=generator).double() for w in widths] for widths in ((3, 5), (4, 6, 2))
    )
    values = debiased_cka(ours, theirs)
    for (i, x), (j, y) in itertools.product(enumerate(ours), enumerate(theirs)):
        k, l = (z.numpy() @ z.numpy().T for z in (x, y))  # noqa: E741
        expected = unbiased_hsic(k, l) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))
        assert values[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_debiased_cka_of_noise_is_near_zero_however_wide():
    noise = [torch.randn(32, 768, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    values = debiased_cka(noise[:2], noise[2:])
    assert values.abs().max() < 0.1  # the biased one is 0.96


def test_rows_that_each_model_reads_for_itself_are_compared_by_the_means_of_their_tokens():
    """NumPy's means; the teacher's rows are the same texts behind two more tokens."""
    task = tiny_task("token")
    ids = torch.randint(5, 30, (12, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:6, 4:] = 0
    ours = {"input_ids": ids, "attention_mask": mask}
    theirs = {key: torch.cat([value[:, :2], value], 1) for key, value in ours.items()}
    found = propose_layer_mapping(task.student, task.teacher, [ours], teacher_batches=[theirs])
    means = []
    for model, batch in ((task.student, ours), (task.teacher, theirs)):
        with torch.no_grad():
            states = model.eval()(**batch, output_hidden_states=True).hidden_states
        real = batch["attention_mask"].numpy().astype(bool)
        means.append([torch.tensor(np.stack([h.numpy()[i][real[i]].mean(0) for i in range(12)])) for h in states])
    assert found.positions == 12
    torch.testing.assert_close(found.similarity, debiased_cka(*means), rtol=1e-3, atol=1e-4)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match=r"at least four, got \[3\]"):
        debiased_cka([torch.randn(3, 2)], [torch.randn(3, 2)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 6), (4, 7)])
def test_no_pairing_in_order_is_better(shape, seed):
    similarity = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pairs = _best_in_order(similarity)
    assert list(pairs) == list(range(1, shape[0] + 1))
    assert list(pairs.values()) == sorted(set(pairs.values()))
    best = max(
        sum(similarity[s, t].item() for s, t in enumerate(chosen))
        for chosen in itertools.combinations(range(shape[1]), shape[0])
    )
    assert sum(similarity[s - 1, t - 1].item() for s, t in pairs.items()) == pytest.approx(best)


@pytest.mark.parametrize("name", ["token", "causal_lm", "image"])
def test_blocks_cut_from_the_teachers_bottom_are_found_again(name):
    task = tiny_task(name)
    student = create_student(task.teacher, layers=[0, 1])
    batches = [task.collate(task.rows[start : start + 12]) for start in (0, 12)]
    proposal = propose_layer_mapping(student, task.teacher, batches)
    assert proposal.mapping == LayerMapping.pairs({1: 1, 2: 2})
    # A causal LM's last hidden state is taken after the final norm, the teacher's second is not.
    assert proposal.similarity[[0, 1], [0, 1]].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    text = str(proposal)
    assert "student layer 1 <- teacher layer 1: 1.00" in text
    assert f"over {proposal.positions} positions" in text
    assert proposal.mean_similarity(LayerMapping.uniform()) < proposal.mean_similarity(proposal.mapping)


def test_neither_model_is_changed():
    task = tiny_task("token")
    task.student.train()
    before = {k: v.clone() for k, v in task.student.state_dict().items()}
    propose_layer_mapping(task.student, task.teacher, [task.collate(task.rows)])
    assert task.student.training
    assert all(p.requires_grad for m in (task.student, task.teacher) for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k, v in task.student.state_dict().items())


def test_padding_is_not_compared():
    results = []
    for extra in (0, 6):
        task = tiny_task("token")
        task.collate.extra = extra
        results.append(propose_layer_mapping(task.student, task.teacher, [task.collate(task.rows)]))
    assert results[0].positions == results[1].positions == sum(len(row["input_ids"]) for row in task.rows)
    assert torch.allclose(results[0].similarity, results[1].similarity, atol=1e-4)


def test_positions_are_spread_over_the_batches():
    task = tiny_task("token")
    batches = [task.collate(task.rows[:24]), task.collate(task.rows[24:])]
    assert propose_layer_mapping(task.student, task.teacher, batches, max_positions=40).positions == 40


def test_the_explanation_names_what_order_forbids_and_what_says_little():
    similarity = torch.tensor([[1.0, 0, 0, 0], [0, 0.1, 0.9, 0.2], [0, 0.95, 0.951, 0.952]])
    text = str(LayerProposal(LayerMapping.pairs({1: 1, 2: 2}), similarity, 7))
    assert "student layer 1 <- teacher layer 1: 0.10; layer 2 is more alike (0.90), but pairs must be in order" in text
    assert "all teacher layers are alike here (0.95 or more), so this says little" in text
    assert "proposed 0.53, uniform 0.93, first 0.53, last 0.93" in text


def test_what_cannot_be_compared_is_refused():
    task = tiny_task("token")
    with pytest.raises(ValueError, match="at least one batch"):
        propose_layer_mapping(task.student, task.teacher, [])
    with pytest.raises(ValueError, match="The student has 4 layers and the teacher 2"):
        propose_layer_mapping(task.teacher, task.student, [task.collate(task.rows)])


def test_the_proposal_trains(make_trainer):
    task = tiny_task("token")
    proposal = propose_layer_mapping(task.student, task.teacher, [task.collate(task.rows)])
    trainer = make_trainer(task, hidden_state_weight=1.0, layer_mapping=dict(proposal.mapping.explicit), max_steps=1)
    trainer.train()
    assert trainer.losses["hidden"].pairs == proposal.mapping.explicit
