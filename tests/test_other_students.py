"""Students of another shape or architecture: the oracle is the teacher, and NumPy's singular value decomposition."""

import numpy as np
import pytest
import torch
import transformers as hf
from test_students import make

from hf_distill.students import create_student
from hf_distill.students.other import principal_components

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def config_of(teacher, **changes):
    return type(teacher.config).from_dict({**teacher.config.to_dict(), **changes})


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "llama", "vit"])
def test_a_student_of_the_teachers_own_config_is_the_teacher(name):
    teacher = make(name)
    student = create_student(teacher, student_config=teacher.config)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not any(a is b for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_narrower_embeddings_are_the_principal_components_of_the_teachers(capsys):
    teacher = make("bert")
    student = create_student(teacher, student_config=config_of(teacher, hidden_size=8, num_attention_heads=2))
    rows = teacher.get_input_embeddings().weight.detach().double().numpy()
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = (left * values)[:, :8]
    ours = student.get_input_embeddings().weight.detach().double().numpy()
    pad = teacher.config.pad_token_id
    kept = [k for k in range(len(rows)) if k != pad]
    scale = ours[kept].std() / expected[kept].std()
    np.testing.assert_allclose(
        ours[kept] @ ours[kept].T, scale**2 * (expected @ expected.T)[np.ix_(kept, kept)], atol=2e-4
    )
    assert "start from the teacher's" in capsys.readouterr().out


def test_components_have_a_spread_of_one_in_falling_order():
    torch.manual_seed(0)
    found = principal_components(torch.randn(50, 6) * torch.arange(1.0, 7.0), 4)
    assert found.std().item() == pytest.approx(1)
    spreads = found.std(0)
    assert bool((spreads[:-1] >= spreads[1:]).all())


def test_another_architecture_gets_the_head_the_classes_and_what_has_the_same_name_and_shape():
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    names = {"id2label": {0: "no", 1: "yes", 2: "so"}, "label2id": {"no": 0, "yes": 1, "so": 2}}
    teacher = hf.BertForSequenceClassification(hf.BertConfig(**sizes, **names, num_hidden_layers=2))
    config = hf.RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=512)
    student = create_student(teacher, student_config=config)
    assert type(student) is hf.RobertaForSequenceClassification
    assert student.config.id2label == names["id2label"]
    assert config.num_labels == 2  # the caller's config stays as it was
    ours, theirs = student.roberta.encoder.layer[0], teacher.bert.encoder.layer[0]
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"student_config": hf.ViTConfig()}, "there is no ModelForSequenceClassification"),
        ({"student_config": hf.BertConfig(), "hidden_size": 8}, "but hidden_size was given too"),
        ({"student_config": hf.BertConfig(), "layer_choice": "last"}, "but layer_choice was given too"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        create_student(make("bert"), **given)
