"""Losses on hidden states, against float64 loops over the papers' equations, SciPy and closed forms."""

import numpy as np
import pytest
import torch

from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.losses import AttentionLoss, HiddenStateLoss
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
