"""Word embeddings of a student that move by one linear map of the teacher's."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from test_recipe import SIZES, make, weights
from test_transfer_set import bert, vit
from test_vocabulary import CORPUS, original

from hf_distill.recipes import Stage
from hf_distill.recipes.embeddings import MappedEmbedding, map_embedding, plain_embedding
from hf_distill.students import trim_vocabulary


def table_of(model):
    return model.get_input_embeddings().weight.detach().double().numpy()


@pytest.fixture
def pair():
    """A teacher, its tokenizer, a student of half the width, and its tokenizer, in which ids are others."""
    torch.manual_seed(0)
    teacher, reader = bert(**SIZES), original("wordpiece")
    fewer = trim_vocabulary(reader, CORPUS, 120)
    student = bert(hidden_size=8, intermediate_size=16, num_hidden_layers=1, vocab_size=len(fewer))
    return teacher, reader, student, fewer


def mapped(pair):
    teacher, reader, student, fewer = pair
    return map_embedding(student, fewer, teacher, reader)


def test_a_row_is_its_start_and_the_teachers_row_of_length_one_times_the_matrix(pair):
    teacher, reader, student, fewer = pair
    start, rows = table_of(student), table_of(teacher)
    words = mapped(pair).get_input_embeddings()
    torch.nn.init.normal_(words.change)
    change = words.change.detach().double().numpy()
    for token, k in fewer.get_vocab().items():
        row = rows[reader.get_vocab()[token]]
        expected = start[k] + row / np.linalg.norm(row) @ change if k != fewer.pad_token_id else start[k]
        assert words(torch.tensor([[k]])).detach().double().numpy()[0, 0] == pytest.approx(expected, abs=1e-5)
        assert words.plain().weight[k].detach().double().numpy() == pytest.approx(expected, abs=1e-5)


def test_before_and_after_the_student_is_the_same(pair):
    before, batch = copy.deepcopy(pair[2]).eval(), pair[3](CORPUS[:4], padding=True, return_tensors="pt")
    student = mapped(pair).eval()
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, before(**batch).logits)
        torch.nn.init.normal_(student.get_input_embeddings().change)
        moved = student(**batch).logits
        assert not torch.allclose(moved, before(**batch).logits, atol=1e-3)
        assert torch.allclose(plain_embedding(student)(**batch).logits, moved, atol=1e-5)
    assert [(name, p.shape, p.requires_grad) for name, p in student.named_parameters()] == [
        (name, p.shape, p.requires_grad) for name, p in before.named_parameters()
    ]
    assert type(student.get_input_embeddings()) is torch.nn.Embedding


def test_a_word_that_is_in_no_text_moves_as_those_like_it(pair):
    rows = torch.eye(4)[[0, 0, 1, 2]] * torch.tensor([[1.0], [3.0], [1.0], [1.0]])
    words = MappedEmbedding(torch.nn.Embedding(4, 3), rows)
    before = words.weight.clone()
    words(torch.tensor([0, 3])).sum().backward()
    with torch.no_grad():
        words.change -= words.change.grad
    moved = (words.plain().weight - before).detach()
    assert torch.allclose(moved[1], moved[0])
    assert moved[0].abs().min() > 0.5
    assert moved[2].abs().max() == 0


@pytest.mark.parametrize(
    "kind", ["no words", "a scaled table", "a frozen table", "a table in two places", "other tokens"]
)
def test_other_students_stay_as_they_are(kind, pair):
    teacher, reader, student, fewer = pair
    if kind == "no words":
        student = vit()
    elif kind == "a scaled table":
        student.bert.embeddings.word_embeddings.__class__ = type("Scaled", (torch.nn.Embedding,), {})
    elif kind == "a frozen table":
        student.get_input_embeddings().requires_grad_(False)
    elif kind == "other tokens":
        fewer = original("unigram")
        reader = type("Reader", (), {"get_vocab": lambda self: {"none of them": 0}})()
    else:
        student.other = torch.nn.Linear(8, len(fewer), bias=False)
        student.other.weight = student.get_input_embeddings().weight
    modules = [type(module) for module in student.modules()]
    learning = [p.requires_grad for p in student.parameters()]
    assert map_embedding(student, fewer, teacher, reader) is student
    assert [p.requires_grad for p in student.parameters()] == learning
    assert [type(module) for module in student.modules()] == modules


def test_the_recipe_changes_rows_together_and_saves_an_ordinary_table(tmp_path):
    teacher = bert(**SIZES)
    stages = [Stage("first", "transfer", 0.5, 1e-2), Stage("second", "task", 0.5, 1e-2)]
    made = make(tmp_path, teacher, vocabulary_size=120, stages=stages)
    assert type(made.student.get_input_embeddings()) is torch.nn.Embedding
    start = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    ids = original("wordpiece").get_vocab()
    rows = table_of(teacher)[
        [ids[token] for token in sorted(made.processing_class.get_vocab(), key=made.processing_class.get_vocab().get)]
    ]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    moved = table_of(made.student) - table_of(start)
    fitted = rows @ np.linalg.lstsq(rows, moved, rcond=None)[0]
    assert np.abs(moved).max() > 1e-2
    assert fitted == pytest.approx(moved, abs=1e-4)
    assert set(weights(made.student)) == set(weights(start))


def test_what_is_frozen_in_a_student_of_ones_own_stays(tmp_path):
    """Through two stages, a run that is done already, and one in which it learns."""
    stages = [Stage("first", "transfer", 0.5, 1e-2), Stage("second", "task", 0.5, 1e-2)]
    teacher, own = bert(**SIZES), bert(hidden_size=8, intermediate_size=16, num_hidden_layers=1, vocab_size=500)
    own.bert.embeddings.requires_grad_(False)
    fixed = {name for name, parameter in own.named_parameters() if not parameter.requires_grad}
    given = {"compression": None, "vocabulary_size": None, "student": own, "stages": stages}
    for _ in range(2):
        made = make(tmp_path, teacher, **given).student
        same = {name for name, parameter in made.named_parameters() if torch.equal(parameter, own.get_parameter(name))}
        assert same >= fixed
        assert "classifier.weight" not in same
        assert {name for name, parameter in made.named_parameters() if not parameter.requires_grad} == fixed
        assert {name for name, parameter in own.named_parameters() if not parameter.requires_grad} == fixed
    own.requires_grad_(True)
    moved = make(tmp_path, teacher, **given).student.get_input_embeddings().weight
    assert not torch.equal(moved, own.get_input_embeddings().weight)
