"""Words replaced as TinyBERT does; the oracles are a masked model that knows the answer, and neighbours in float64."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset
from test_transfer_set import bert, labelled
from test_vocabulary import CORPUS, original

from hf_distill.recipes import compress
from hf_distill.transfer import build_transfer_set
from hf_distill.transfer.replace import neighbour_words, neighbours, replace_words, whole_words

NAMES = [f"w{i}" for i in range(30)]
FIRST = 5  # the id of w0


@pytest.fixture
def tokenizer(tmp_path):
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, "##x", ",", '"']
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    return hf.BertTokenizerFast(str(tmp_path / "vocab.txt"))


class Successor(torch.nn.Module):
    """In every place it expects the word that comes after the one before it; then the one after that, and so on."""

    def __init__(self):
        super().__init__()
        self.config, self.device, self.asked = hf.BertConfig(), torch.device("cpu"), []

    def forward(self, input_ids, **_):
        self.asked.append(input_ids)
        before = input_ids.roll(1, 1)
        steps = (torch.arange(38) - before[..., None] - 1) % 38
        return SimpleNamespace(logits=-steps.float())


def test_every_word_may_become_the_likeliest_in_its_place(tokenizer):
    texts = [["w3", "w9", "w20", "w11"], ["w7", "w1"]]
    made = replace_words(
        texts, 40, masked_lm=Successor(), processing_class=tokenizer, share=1.0, candidates=1, batch_size=3
    )
    expected = [[f"w{int(word[1:]) + 1}" for word in text[:-1]] for text in texts]
    assert {tuple(text[1:]) for text in made} == {tuple(text) for text in expected}


@pytest.mark.parametrize("kind", [str, Path])
def test_the_model_may_be_a_folder(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=38, **sizes))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    made = replace_words([["w3", "w9"]], 5, masked_lm=kind(tmp_path / "model"), share=1.0)
    assert made == replace_words([["w3", "w9"]], 5, masked_lm=model, processing_class=tokenizer, share=1.0)


def test_the_word_is_one_of_the_likeliest_and_all_of_these_come(tokenizer):
    made = replace_words(
        [["w3", "w9"]], 400, masked_lm=Successor(), processing_class=tokenizer, share=1.0, candidates=5
    )
    assert {text[1] for text in made} == {"w4", "w5", "w6", "w7", "w8"}


def test_one_word_is_masked_at_a_time_and_punctuation_stays(tokenizer):
    model = Successor()
    made = replace_words([['"w3', "w9,"]], 30, masked_lm=model, processing_class=tokenizer, share=1.0, candidates=1)
    assert {text[1] for text in made} == {"w4,"}
    assert {text[0][0] for text in made} == {'"'}
    assert all(((ids == tokenizer.mask_token_id).sum(1) == 1).all() for ids in model.asked)


def test_words_of_several_tokens_and_marks_alone_stay(tokenizer):
    made = replace_words([["w3x", ",", "w5"]], 20, masked_lm=Successor(), processing_class=tokenizer, share=1.0)
    assert {tuple(text[:2]) for text in made} == {("w3x", ",")}


def test_the_share_is_the_probability_and_the_seed_decides(tokenizer):
    def run(seed):
        return replace_words([["w0"] * 50], 100, seed, masked_lm=Successor(), processing_class=tokenizer, candidates=1)

    made = run(0)
    changed = np.mean([word != "w0" for text in made for word in text[1:]])
    assert abs(changed - 0.4) < 4 * np.sqrt(0.24 / 4900)
    assert made == run(0) != run(1)


def test_neighbours_are_the_nearest_by_cosine(tokenizer):
    teacher = bert(vocab_size=len(tokenizer))
    table = teacher.get_input_embeddings().weight.detach().double().numpy()
    words = [f"w{i}" for i in range(30)]
    made = neighbour_words([words], 600, teacher=teacher, processing_class=tokenizer, candidates=3)
    for i in range(30):
        row = table[FIRST + i]
        others = [j for j in range(30) if j != i]
        cosine = {j: row @ table[FIRST + j] / np.linalg.norm(row) / np.linalg.norm(table[FIRST + j]) for j in others}
        nearest = sorted(others, key=cosine.__getitem__)[-3:]
        assert {text[i] for text in made} == {f"w{i}", *(f"w{j}" for j in nearest)}


@pytest.mark.parametrize("name", ["wordpiece", "byte_level", "unigram"])
def test_whole_words_are_those_that_come_back_as_one_token(name):
    tokenizer = original(name)
    words = whole_words(tokenizer)
    assert words
    for token, word in words.items():
        text = tokenizer(f"ba {word}", add_special_tokens=False)["input_ids"]
        assert text[-1] == token
        assert token not in tokenizer.all_special_ids


def test_texts_pairs_and_lists_of_words_are_served(tokenizer):
    given = {"augment": ("replace_words", "neighbour_words"), "masked_lm": Successor(), "augmented_rows": 20,
             "masked_lm_processing_class": tokenizer, "teacher": bert(vocab_size=len(tokenizer)),
             "processing_class": tokenizer}  # fmt: skip
    texts = ["w1 w2 w3 w4", "w9 w5 w7"]
    single = build_transfer_set(Dataset.from_dict({"text": texts}), "text", **given)
    pairs = build_transfer_set(Dataset.from_dict({"a": texts, "b": texts[::-1]}), ["a", "b"], **given)
    words = build_transfer_set(Dataset.from_dict({"words": [text.split() for text in texts]}), "words", **given)
    for made in (single, pairs, words):
        assert {"task", "replace_words", "neighbour_words"} == set(made["source"])
    assert {len(row.split()) for row in single["text"]} == {len(row) for row in words["words"]} == {3, 4}
    assert all(row["a"] in texts or row["b"] in texts for row in pairs)


def test_what_was_made_is_kept_for_the_same_texts_and_model(tokenizer, tmp_path):
    texts, model = [["w3", "w9"], ["w20", "w11"]], Successor()
    given = {"processing_class": tokenizer, "share": 1.0, "cache_dir": tmp_path / "kept"}
    made = replace_words(texts, 10, masked_lm=model, **given)
    assert made == replace_words(texts, 10, masked_lm=model, processing_class=tokenizer, share=1.0)
    asked = len(model.asked)
    assert replace_words(texts, 10, masked_lm=model, **given) == made
    assert len(model.asked) == asked
    other = Successor()
    other.register_buffer("weight", torch.ones(1))
    for k, changed in enumerate((
        replace_words(texts[::-1], 10, masked_lm=model, **given),
        replace_words(texts, 11, masked_lm=model, **given),
        replace_words(texts, 10, 1, masked_lm=model, **given),
        replace_words(texts, 10, masked_lm=model, **given, candidates=1),
        replace_words(texts, 10, masked_lm=other, **given),
    )):  # fmt: skip
        assert len(list((tmp_path / "kept").iterdir())) == 6
        assert (changed == made) == (k == 4)
    (tmp_path / "kept" / ".unfinished-x").mkdir()  # of a run that was killed
    assert replace_words(texts, 10, masked_lm=model, **given) == made


def test_by_default_the_teachers_neighbours_are_asked_where_there_are_any(tokenizer):
    rows = Dataset.from_dict({"text": ["w1 w2 w3, w4", "w9 w5 w7"]})
    plain = {"task", "recombine", "drop_words"}
    teacher = bert(vocab_size=len(tokenizer))
    made = build_transfer_set(rows, "text", teacher=teacher, processing_class=tokenizer)
    assert set(made["source"]) == plain | {"neighbour_words"}
    assert set(build_transfer_set(rows, "text")["source"]) == plain
    assert set(build_transfer_set(rows, "text", teacher=teacher)["source"]) == plain
    elsewhere = build_transfer_set(rows, "text", teacher=teacher.to("meta"), processing_class=tokenizer)
    assert set(elsewhere["source"]) == plain


@pytest.mark.parametrize("words", [{}, {0: "w"}])
def test_without_two_whole_words_there_are_no_neighbours(words, tokenizer):
    assert neighbours(torch.eye(3), tokenizer, words, ["w1"], 3) == {}


def test_a_token_without_a_row_in_the_table_is_nobodys_neighbour(tokenizer):
    """Tokens that were added to a tokenizer alone, as of templates that a classifier never reads."""
    teacher = bert(vocab_size=FIRST + 4)
    made = neighbour_words([["w1", "w9"]], 50, teacher=teacher, processing_class=tokenizer, share=1.0)
    assert {text[0] for text in made} == {"w0", "w2", "w3"}
    assert {text[1] for text in made} == {"w9"}


def test_a_missing_model_is_told(tokenizer):
    rows = Dataset.from_dict({"text": ["w1"]})
    with pytest.raises(ValueError, match="needs a masked language model"):
        build_transfer_set(rows, "text", augment=["replace_words"])
    with pytest.raises(ValueError, match="Pass teacher="):
        build_transfer_set(rows, "text", augment=["neighbour_words"])
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        neighbour_words([["w1"]], 1, teacher=bert(), processing_class=tokenizer, share=0.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_recipe_passes_it_through(tmp_path):
    tokenizer = original("wordpiece")
    bert("MaskedLM").save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    made = compress(
        bert(hidden_size=16, intermediate_size=32, num_hidden_layers=3), tokenizer, labelled({"text": CORPUS[:30]}),
        tmp_path / "out", compression=3, vocabulary_size=120, augmented_rows=10, training_rows=16,
        augment=("replace_words", "neighbour_words"), masked_lm=str(tmp_path / "mlm"),
        arguments={"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8},
    )  # fmt: skip
    assert made.student.num_parameters() > 0
    assert len(list((tmp_path / "out" / "answers" / "texts").glob("*.json"))) == 1
