"""Trimmed tokenizers: the oracle is the tokenizer they come from, on text that it cuts into kept tokens."""

import copy
import functools
import json
import random

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_distill.students import trim_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SYLLABLES = ["ba", "co", "di", "fu", "gel", "hom", "ix", "jar", "ku", "lem", "né", "ö", "str", "ing", "中", "文"]


def words(seed, number=400):
    generator = random.Random(seed)
    return ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(number)]


def texts(seed, number=150):
    generator, vocabulary = random.Random(seed), words(seed)
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    return [" ".join(generator.choices(vocabulary, weights, k=generator.randint(1, 9))) for _ in range(number)]


CORPUS, OTHER = texts(0, 600), [*texts(0, 900)[600:], *texts(1, 200), "Zebra? 12", "ba" * 40, "日本 ba", " ba  co"]
TRAINING = [*CORPUS, *texts(1, 200), "日本 zebra"]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return hf.BertTokenizerFast(vocab=tokenizer.get_vocab(), tokenize_chinese_chars=False, model_max_length=40)


def byte_level(kind=hf.RobertaTokenizerFast):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def gpt2():
    tokenizer = byte_level(hf.GPT2TokenizerFast)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    return tokenizer


def byte_fallback():
    """As in Llama: spaces marked, characters out of the vocabulary spelled in bytes, special tokens first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def marked_ends():
    """As in CLIP: the last part of a word is marked, and ids are shared by cls and sep of a BERT processor."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens(["<pad>", "<end>"])  # beyond the model's vocabulary
    tokenizer.post_processor = processors.Sequence(
        [processors.RobertaProcessing(("<end>", tokenizer.token_to_id("<end>")), ("<unk>", 0))]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def unigram(kind=hf.XLMRobertaTokenizerFast, special=("<s>", "<pad>", "</s>", "<unk>")):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.UnigramTrainer(vocab_size=250, special_tokens=[*special], unk_token="<unk>", show_progress=False),
    )
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    extra = [("<mask>", 0.0)] if kind is hf.XLMRobertaTokenizerFast else []
    return kind(vocab=[*(tuple(piece) for piece in vocabulary), *extra], **({} if extra else {"extra_ids": 3}))


def t5():
    return unigram(hf.T5TokenizerFast, ("<pad>", "</s>", "<unk>"))


def word_level():
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


KINDS = {kind.__name__: kind for kind in
         (wordpiece, byte_level, gpt2, byte_fallback, marked_ends, unigram, t5, word_level)}  # fmt: skip
SIZES = {"byte_level": 330, "gpt2": 330, "byte_fallback": 400, "t5": 130, "unigram": 130, "word_level": 60}


@functools.cache
def original(name):
    return KINDS[name]()


@functools.cache
def trimmed(name, characters="all"):
    return original(name), trim_vocabulary(original(name), CORPUS, SIZES.get(name, 130), characters=characters)


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("characters", ["all", "seen"])
@pytest.mark.parametrize("name", KINDS)
def test_text_of_kept_tokens_is_cut_as_before(name, characters):
    old, new = trimmed(name, characters=characters)
    kept = set(new.get_vocab())
    assert kept < set(old.get_vocab())
    within = [text for text in OTHER if set(tokens(old, text)) <= kept]
    assert 40 < len(within) < len(OTHER) - 5  # some of the text needs tokens that are gone
    assert [tokens(new, text) for text in within] == [tokens(old, text) for text in within]
    pairs = list(zip(within[1:], within, strict=False))
    ours, theirs = (tokenizer(pairs, padding=bool(tokenizer.pad_token)) for tokenizer in (new, old))
    assert ours["attention_mask"] == theirs["attention_mask"]
    for a, b in zip(ours["input_ids"], theirs["input_ids"], strict=True):
        assert new.convert_ids_to_tokens(a) == old.convert_ids_to_tokens(b)


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_consecutive_and_in_the_old_order(name):
    old, new = trimmed(name)
    before, after = old.get_vocab(), new.get_vocab()
    assert sorted(after.values()) == list(range(len(after))) == list(range(SIZES.get(name, 130)))
    assert sorted(after, key=after.get) == sorted(after, key=before.get)
    assert [t for t in after if t in new.all_special_tokens] == [t for t in after if t in old.all_special_tokens]
    for key in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token"):
        assert getattr(new, key) == getattr(old, key)
        assert getattr(new, f"{key}_id") == (None if getattr(old, key) is None else after[getattr(old, key)])
    same = ("model_max_length", "padding_side", "truncation_side", "chat_template", "model_input_names")
    assert [getattr(new, key) for key in same] == [getattr(old, key) for key in same]


def test_sides_that_were_set_on_the_tokenizer_stay():
    old = copy.deepcopy(original("wordpiece"))
    old.padding_side, old.truncation_side = "left", "left"
    new = trim_vocabulary(old, CORPUS, 130)
    assert (new.padding_side, new.truncation_side) == ("left", "left")


@pytest.mark.parametrize("name", KINDS)
def test_the_tokens_used_most_are_kept(name):
    old, new = trimmed(name)
    counts = {}
    for text in CORPUS:
        for token in old.tokenize(text):
            counts[token] = counts.get(token, 0) + 1
    gone = [counts[token] for token in counts if token not in new.get_vocab()]
    kept = sorted((counts.get(token, 0) for token in new.get_vocab()), reverse=True)
    assert gone
    assert kept[20] > max(gone)
    if name in ("wordpiece", "word_level", "unigram"):  # no token needs another one
        assert sorted([*kept, *gone], reverse=True)[: sum(c > max(gone) for c in kept)] == kept[: sum(
            c > max(gone) for c in kept)]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in KINDS if name != "word_level"])
def test_no_known_character_becomes_unknown(name):
    old, new = trimmed(name)
    for text in OTHER:
        known = old.unk_token is None or old.unk_token not in old.tokenize(text)
        assert not known or new.unk_token is None or new.unk_token not in new.tokenize(text)


@pytest.mark.parametrize("name", ["byte_level", "gpt2", "byte_fallback", "marked_ends"])
def test_every_token_of_byte_pair_encoding_can_be_reached(name):
    new = trimmed(name)[1]
    model = json.loads(new.backend_tokenizer.to_str())["model"]
    results = {"".join(pair) for pair in model["merges"]}
    basic = {t for t in model["vocab"] if len(t.removesuffix("</w>")) == 1 or t.startswith("<")}
    assert basic | results == set(model["vocab"])
    assert {part for pair in model["merges"] for part in pair} <= set(model["vocab"])


@pytest.mark.parametrize("name", KINDS)
def test_it_saves_and_reloads(name, tmp_path):
    new = trimmed(name)[1]
    new.save_pretrained(tmp_path / "one")
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert type(again) is type(new)
    assert [again(text)["input_ids"] for text in OTHER] == [new(text)["input_ids"] for text in OTHER]
    assert again.decode(again(OTHER[0])["input_ids"]) == new.decode(new(OTHER[0])["input_ids"])
    assert again.get_vocab() == new.get_vocab()
    assert new.name_or_path == ""


def test_characters_that_the_corpus_does_not_use_can_go():
    everything, seen = (trimmed("wordpiece", characters=characters)[1] for characters in ("all", "seen"))
    assert "z" in everything.get_vocab()
    assert "z" not in seen.get_vocab()
    assert seen.tokenize("zebra") == ["[UNK]"]
    assert {f"{mark}b" for mark in ("", "##")} <= set(seen.get_vocab())


def test_a_small_corpus_keeps_no_more_than_it_needs():
    assert len(trim_vocabulary(original("wordpiece"), ["ba"], 200, characters="seen")) < 12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 20}, r"at least \d+, got 20: .*special and added tokens, .* characters='seen'"),
        ({"size": 3, "characters": "seen"}, r"at least \d+, got 3"),
        ({"size": 100.0}, r"whole number .* got 100.0"),
        ({"corpus": "one text"}, "got one text. Pass a list"),
        ({"corpus": []}, "holds no text"),
        ({"corpus": [["a", "b"]]}, "must hold texts, got list"),
        ({"characters": "some"}, "must be 'all' or 'seen', got 'some'"),
        ({"tokenizer": object()}, "only in a fast tokenizer, got object"),
    ],
)
def test_bad_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(**{"tokenizer": original("wordpiece"), "corpus": CORPUS, "size": 130, **kwargs})
