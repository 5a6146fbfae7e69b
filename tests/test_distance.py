"""How far a student starts from its teacher; the oracle is NumPy's least squares and closed forms."""

import numpy as np
import pytest
import torch
import transformers as hf

from hf_distill.students import create_student, distance_from_teacher
from hf_distill.students.distance import unexplained

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def bert(kind="SequenceClassification", **config):
    torch.manual_seed(0)
    return getattr(hf, f"BertFor{kind}")(hf.BertConfig(vocab_size=50, **SIZES, **config)).eval()


def batches(rows=16, padding=0):
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (rows, 8))
    mask = torch.ones_like(ids)
    mask[::2, 8 - padding :] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_the_teacher_itself_is_at_no_distance(kind):
    teacher = bert(kind)
    found = distance_from_teacher(create_student(teacher, num_hidden_layers=3), teacher, batches())
    assert found == pytest.approx({"logits": 0, "hidden_states": 0}, abs=1e-9)


def test_a_student_that_says_nothing_is_at_distance_one():
    teacher = bert()
    student = create_student(teacher, num_hidden_layers=1)
    torch.nn.init.zeros_(student.classifier.weight)
    assert distance_from_teacher(student, teacher, batches())["logits"] == pytest.approx(1)


def test_what_no_forward_reads_may_stand_in_the_batches_and_an_error_leaves_the_modes():
    teacher = bert().train()
    student = create_student(teacher, num_hidden_layers=1).eval()
    (batch,) = batches()
    more = {**batch, "idx": list(range(16)), "labels": torch.zeros(16, dtype=torch.long)}
    assert distance_from_teacher(student, teacher, [more]) == distance_from_teacher(student, teacher, [batch])
    with pytest.raises(IndexError):
        distance_from_teacher(student, teacher, [{"input_ids": torch.full((16, 8), 50)}])
    assert (student.training, teacher.training) == (False, True)


def test_a_linear_map_costs_nothing_and_noise_all():
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(400, 5)) + 3
    mapped = inputs @ draw.normal(size=(5, 7)) - 2
    noise = draw.normal(size=(400, 7))
    mixed = mapped + noise
    centred, target = inputs - inputs.mean(0), mixed - mixed.mean(0)
    residual = np.linalg.lstsq(centred, target, rcond=None)[1].sum()
    assert unexplained(torch.tensor(inputs), torch.tensor(mapped)) == pytest.approx(0, abs=1e-12)
    assert unexplained(torch.tensor(inputs), torch.tensor(noise)) > 0.95
    assert unexplained(torch.tensor(inputs), torch.tensor(mixed)) == pytest.approx(residual / np.square(target).sum())


def test_a_width_cut_under_layer_norm_leaves_a_gap_and_a_random_start_a_larger_one():
    teacher = bert(initializer_range=0.3)
    cut = create_student(teacher, hidden_size=8)
    torch.manual_seed(2)
    drawn = type(teacher)(cut.config).eval()
    ours, random = (distance_from_teacher(model, teacher, batches(64)) for model in (cut, drawn))
    assert 0.01 < ours["hidden_states"] < random["hidden_states"]


def test_padding_does_not_count():
    teacher = bert("TokenClassification")
    student = create_student(teacher, num_hidden_layers=1)
    padded = batches(padding=3)
    changed = [{**padded[0], "input_ids": torch.where(padded[0]["attention_mask"] == 1, padded[0]["input_ids"], 7)}]
    assert distance_from_teacher(student, teacher, padded) == distance_from_teacher(student, teacher, changed)


def test_too_few_positions_are_refused():
    with pytest.raises(ValueError, match="8 positions, too few for the student's 16 features"):
        distance_from_teacher(bert(), bert(), batches(1))
