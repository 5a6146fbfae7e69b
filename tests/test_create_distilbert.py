"""BERT -> DistilBERT; the oracle is BERT itself with blocks left out."""

import pytest
import torch
import transformers as hf
from test_students import SIZES, make, noisy

from hf_distill.students import create_distilbert, create_student

# Transformers 5.0 uses torch.jit itself, which recent versions of torch deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def bert(name):
    torch.manual_seed(0)
    return noisy(getattr(hf, f"Bert{name}")(hf.BertConfig(**SIZES)))


TASKS = "ForMaskedLM ForTokenClassification ForQuestionAnswering ForSequenceClassification ForMultipleChoice"


@pytest.mark.parametrize("name", ["Model", *TASKS.split()])
def test_distilbert_with_the_first_segment_is_berts_student_but_for_relu(name, tmp_path):
    teacher = bert(name)
    create_distilbert(teacher, keep_first_segment=True).save_pretrained(tmp_path)
    distilbert = getattr(hf, f"DistilBert{name}").from_pretrained(tmp_path)
    student = create_student(teacher, layers=[1, 3, 5])
    ids = torch.arange(3, 19).view((1, 2, 8) if name == "ForMultipleChoice" else (2, 8))
    if hasattr(distilbert, "pre_classifier"):  # only here outputs differ, by 0.02 and more
        assert (distilbert(ids).logits - student(ids).logits).abs().max() > 0.01
        student.bert.pooler.activation = torch.nn.ReLU()
    for ours, theirs in zip(distilbert(ids).to_tuple(), student(ids).to_tuple(), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # at most 1e-6 measured, on numbers of order 1


def test_distilbert_is_berts_student_without_token_types_and_next_sentences():
    teacher, ids = bert("ForPreTraining"), torch.arange(3, 19).view(2, 8)
    half, chosen = create_distilbert(teacher), create_distilbert(teacher, layers=[0, 4])
    assert (half(ids).logits - create_student(teacher, num_hidden_layers=3)(ids).prediction_logits).abs().max() > 0.1
    teacher.bert.embeddings.token_type_embeddings.weight.data.zero_()
    for ours, layers in ((half, [1, 3, 5]), (chosen, [0, 4])):
        theirs = create_student(teacher, layers=layers)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).prediction_logits, rtol=0, atol=1e-5)


AUTHORS = [0, 2, 4, 7, 9, 11]  # extract_distilbert.py of the authors' scripts


@pytest.mark.parametrize(("kwargs", "kept"), [({}, [1, 3, 5, 7, 9, 11]), ({"layers": AUTHORS}, AUTHORS)])
def test_of_twelve_blocks_distilbert_has_every_second_or_those_of_the_authors(kwargs, kept):
    torch.manual_seed(0)
    teacher = hf.BertForMaskedLM(hf.BertConfig(**{**SIZES, "num_hidden_layers": 12}))
    blocks = create_distilbert(teacher, **kwargs).distilbert.transformer.layer
    assert len(blocks) == len(kept)
    for block, k in zip(blocks, kept, strict=True):
        theirs = teacher.bert.encoder.layer[k]
        assert torch.equal(block.attention.q_lin.weight, theirs.attention.self.query.weight)
        assert torch.equal(block.ffn.lin2.weight, theirs.output.dense.weight)


def test_what_distilbert_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-12 built in, .* 1e-05"):
        create_distilbert(hf.BertModel(hf.BertConfig(**SIZES, layer_norm_eps=1e-5)))
    with pytest.raises(ValueError, match=r"needs one of BertModel, .* got Roberta.* create_student keeps"):
        create_distilbert(make("roberta"))
