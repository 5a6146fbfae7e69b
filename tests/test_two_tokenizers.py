"""Models that do not share a tokenizer."""

import datasets
import pytest
import torch
from parity import different_tensors
from test_vocabulary import original, trimmed
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, DataCollatorWithPadding

from hf_distill import DistillationTrainer
from hf_distill.teachers.cached import TEACHER_LOGITS
from hf_distill.transfer import TwoTokenizersCollator

NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
TEXTS = ["ba co di ba", "fu gel", "ba ba ku lem co", "hom ix", "co", "di di fu jar", "ku ba", "lem gel hom co di"] * 2


def tokenizers():
    """The student's vocabulary is a part of the teacher's, so the same word has another id."""
    whole, small = original("wordpiece"), trimmed("wordpiece")[1]
    assert small("ba co di")["input_ids"] != whole("ba co di")["input_ids"]
    return small, whole


def model(tokenizer, layers, seed, kind=BertForSequenceClassification):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": layers}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    built = kind(
        BertConfig(
            vocab_size=len(tokenizer), problem_type="single_label_classification", **sizes, **no_dropout, **NAMES
        )
    )
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def data():
    return datasets.Dataset.from_dict({"text": TEXTS, "label": [i % 3 for i in range(len(TEXTS))]})


def run(make_args, student, teacher, dataset, collator, **kwargs):
    trainer = DistillationTrainer(
        student, make_args(per_device_train_batch_size=4, num_train_epochs=2, **kwargs), collator, dataset,
        eval_dataset=dataset, teacher_model=teacher,
    )  # fmt: skip
    trainer.train()
    return {**trainer.model.state_dict(), "eval": torch.tensor(trainer.evaluate()["eval_soft_loss"])}


@pytest.fixture
def by_hand(make_args):
    """Two tokenisations, the teacher's answers to its own as a column, and no teacher."""
    small, whole = tokenizers()
    teacher = model(whole, 3, seed=1).eval()
    with torch.no_grad():
        answers = [teacher(**whole(text, return_tensors="pt")).logits[0].tolist() for text in TEXTS]
    rows = data().map(lambda row: small(row["text"])).remove_columns("text").add_column(TEACHER_LOGITS, answers)
    return run(make_args, model(small, 2, seed=0), None, rows, DataCollatorWithPadding(small))


def test_each_model_reads_its_own_tokens(by_hand, make_args):
    small, whole = tokenizers()
    models = model(small, 2, seed=0), model(whole, 3, seed=1)
    found = run(make_args, *models, data(), TwoTokenizersCollator(small, whole))
    assert not different_tensors(found, by_hand)


def test_the_cache_keeps_what_the_teacher_says_of_its_own_tokens(by_hand, make_args, tmp_path, capsys):
    small, whole = tokenizers()
    for _ in range(2):
        models = model(small, 2, seed=0), model(whole, 3, seed=1)
        cache = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_batch_size": 8}
        found = run(make_args, *models, data(), TwoTokenizersCollator(small, whole), **cache)
        assert not different_tensors(found, by_hand)
    assert "asked about 0 of 16 rows" in capsys.readouterr().out


def test_classes_are_matched_by_name(by_hand, make_args):
    small, whole = tokenizers()
    teacher = model(whole, 3, seed=1)
    for parameter in (teacher.classifier.weight, teacher.classifier.bias):
        parameter.data = parameter.data[[2, 0, 1]]
    teacher.config.id2label = {0: "c", 1: "a", 2: "b"}
    found = run(make_args, model(small, 2, seed=0), teacher, data(), TwoTokenizersCollator(small, whole))
    assert not different_tensors(found, by_hand)


def test_pairs_are_encoded_as_pairs():
    small, whole = tokenizers()
    rows = [{"a": "ba co", "b": "di", "label": 1}, {"a": "fu", "b": "gel ba ba", "label": 0}]
    batch = TwoTokenizersCollator(small, whole, ["a", "b"], max_length=6)(rows)
    expected = whole(["ba co", "fu"], ["di", "gel ba ba"], padding=True, return_tensors="pt")
    assert all(torch.equal(batch[f"teacher_{name}"], value) for name, value in expected.items())
    assert batch["input_ids"].shape[1] <= 6
    assert batch["labels"].tolist() == [1, 0]


def test_what_compares_tokens_is_refused(make_args):
    small, whole = tokenizers()
    collator = TwoTokenizersCollator(small, whole)
    with pytest.raises(ValueError, match="hidden states or attention token by token"):
        run(make_args, model(small, 2, 0), model(whole, 3, 1), data(), collator, hidden_state_weight=1.0)
    models = [model(tokenizer, 2, 0, BertForTokenClassification) for tokenizer in (small, whole)]
    with pytest.raises(ValueError, match="kind 'tokens'"):
        run(make_args, *models, data(), collator)
    with pytest.raises(ValueError, match="no column 'sentence'"):
        run(make_args, model(small, 2, 0), model(whole, 3, 1), data(), TwoTokenizersCollator(small, whole, "sentence"))
    with pytest.raises(ValueError, match="two of pairs"):
        TwoTokenizersCollator(small, whole, [])


def test_a_row_without_a_label_leaves_the_others_theirs():
    small, whole = tokenizers()
    collate = TwoTokenizersCollator(small, whole)
    texts = ["ba co", "fu", "di"]
    for name, labels in {"label": [1, None, 2], "labels": [None, 0, 2]}.items():
        rows = [{"text": text, name: label} for text, label in zip(texts, labels, strict=True)]
        assert collate(rows)["labels"].tolist() == [-100 if label is None else label for label in labels]
    numbers = collate([{"text": "ba", "label": 0.5}, {"text": "co", "label": None}])["labels"]
    assert numbers[0] == 0.5
    assert numbers[1].isnan()
    assert "labels" not in collate([{"text": "ba", "label": None}])
    with pytest.raises(ValueError, match="rows with several labels and rows without any"):
        collate([{"text": "ba", "label": [1.0, 0.0]}, {"text": "co", "label": None}])
