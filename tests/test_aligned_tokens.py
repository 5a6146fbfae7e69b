"""Token tasks of two models that do not share a tokenizer: by words, and by characters."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
from parity import different_tensors
from scipy.special import softmax
from test_two_tokenizers import NAMES
from test_vocabulary import byte_level, wordpiece
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    DataCollatorForTokenClassification,
    RobertaTokenizerFast,
)

from hf_distill import DistillationTrainer
from hf_distill.activations import Activations
from hf_distill.batch import Batch
from hf_distill.heads import head_of
from hf_distill.losses import CKALoss, ContrastiveLoss, HardLabelLoss, HiddenStateLoss, LELPLoss, SoftTargetLoss
from hf_distill.token_alignment import on_student_tokens
from hf_distill.transfer import SpanAlignedCollator, TwoTokenizersCollator, WordAlignedCollator

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(*pieces):
    return BertTokenizerFast(vocab={piece: index for index, piece in enumerate([*SPECIAL, *pieces])})


# "unhappy" is two tokens of the student and one of the teacher, "songbirds" one and three.
STUDENT = tokenizer("un", "##happy", "songbirds", "are", "who", "sing", "?")
TEACHER = tokenizer("unhappy", "song", "##bird", "##s", "are", "who", "sing", "?")
WORDS = [["unhappy", "songbirds", "are"], ["songbirds", "sing"]]
CACHED = {"teacher_dtype": "float32"}
QUESTION, CONTEXT = "who are unhappy ?", "songbirds are unhappy"


def model(tokens, layers, seed, kind=BertForTokenClassification):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": layers}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    labels = {} if kind is BertForQuestionAnswering else NAMES
    built = kind(BertConfig(vocab_size=len(tokens), pad_token_id=tokens.pad_token_id, **sizes, **no_dropout, **labels))
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


class TestWords:
    def test_each_words_first_tokens_meet(self):
        rows = [{"tokens": words, "labels": [2, 0, 1][: len(words)]} for words in WORDS]
        batch = WordAlignedCollator(STUDENT, TEACHER)(rows)
        # [CLS] un ##happy songbirds are [SEP]    <-    [CLS] unhappy song ##bird ##s are [SEP]
        assert batch["teacher_positions"].tolist() == [[-1, 1, -1, 2, 5, -1], [-1, 1, 4, -1, -1, -1]]
        assert batch["labels"].tolist() == [[-100, 2, -100, 0, 1, -100], [-100, 2, 0, -100, -100, -100]]
        logits = torch.randn(2, 7, 3)
        moved = on_student_tokens(Activations(logits), batch).logits
        assert torch.equal(moved[0, [1, 3, 4]], logits[0, [1, 2, 5]])
        assert torch.equal(moved[1, [1, 2]], logits[1, [1, 4]])
        masks = Batch.from_inputs(batch, head_of(model(STUDENT, 1, 0))).masks
        assert masks["predictions"].nonzero().tolist() == [[0, 1], [0, 3], [0, 4], [1, 1], [1, 2]]

    def test_a_text_is_split_at_white_space(self):
        collator = WordAlignedCollator(STUDENT, TEACHER, words_column="text")
        batches = [collator([{"text": text}]) for text in (" ".join(WORDS[0]), WORDS[0])]
        assert all(torch.equal(batches[0][name], value) for name, value in batches[1].items())
        assert "labels" not in batches[0]
        masks = Batch.from_inputs(batches[0], head_of(model(STUDENT, 1, 0))).masks
        assert masks["predictions"].nonzero().tolist() == [[0, 1], [0, 3], [0, 4]]  # without labels all words count

    def test_words_that_the_teacher_does_not_reach_have_a_label_and_no_soft_target(self):
        collator = WordAlignedCollator(STUDENT, TEACHER, teacher_max_length=4)
        batch = collator([{"tokens": WORDS[0], "labels": [2, 0, 1]}])
        masks = Batch.from_inputs(batch, head_of(model(STUDENT, 1, 0))).masks
        assert masks["labels"].nonzero().tolist() == [[0, 1], [0, 3], [0, 4]]
        assert masks["predictions"].nonzero().tolist() == [[0, 1], [0, 3]]
        assert masks["all_predictions"].nonzero().tolist() == [[0, 1], [0, 3]]

    def test_byte_level_and_wordpiece_meet_at_every_word(self):
        whole = byte_level(RobertaTokenizerFast)
        roberta = RobertaTokenizerFast(vocab=whole.get_vocab(), merges=_merges(whole), add_prefix_space=True)
        bert = wordpiece()
        words = ["ba", "cofu", "Zebra", "gelhomix", "né"]
        batch = WordAlignedCollator(bert, roberta)([{"tokens": words}])
        ours, theirs = batch["input_ids"][0], batch["teacher_input_ids"][0]
        places = batch["teacher_positions"][0]
        assert (places >= 0).sum() == len(words)
        ends = [*places[places >= 0].tolist()[1:], len(theirs) - 1]
        for word, start, end in zip(words, places[places >= 0].tolist(), ends, strict=True):
            assert "".join(roberta.decode(theirs[start:end]).split()) == word  # the oldest release puts spaces in
        assert bert.decode(ours[places >= 0][0]) == "ba"

    def test_identical_tokenizers_train_as_one_does(self, make_args, tmp_path):
        tokens = wordpiece()
        words = [["ba", "cofu", "gel"], ["homixlem", "ba"], ["di", "dijar", "ku", "co"], ["lemgel"]] * 3
        labels = [[(i + j) % 3 for j in range(len(row))] for i, row in enumerate(words)]
        data = datasets.Dataset.from_dict({"tokens": words, "labels": labels})

        def encode(row):
            encoded = tokens(row["tokens"], is_split_into_words=True)
            ids = encoded.word_ids()
            first = [word is not None and word != ids[i - 1] for i, word in enumerate(ids)]
            supervised = [row["labels"][w] if is_first else -100 for w, is_first in zip(ids, first, strict=True)]
            return {**encoded, "labels": supervised}

        found = []
        for rows, collator, cache in (
            (data.map(encode, remove_columns=["tokens"]), DataCollatorForTokenClassification(tokens), {}),
            (data, WordAlignedCollator(tokens, tokens), {}),
            (data, WordAlignedCollator(tokens, tokens), {**CACHED, "teacher_cache_dir": str(tmp_path)}),
        ):  # fmt: skip
            student, teacher = model(tokens, 2, seed=0), model(tokens, 3, seed=1)
            args = make_args(per_device_train_batch_size=4, num_train_epochs=2, **cache)
            trainer = DistillationTrainer(student, args, collator, rows, eval_dataset=rows, teacher_model=teacher)
            trainer.train()
            soft = torch.tensor(trainer.evaluate()["eval_soft_loss"])
            found.append({**trainer.model.state_dict(), "eval": soft})
        assert different_tensors(found[1], found[0]) == []
        assert different_tensors(found[2], found[0]) == []

    def test_a_teacher_of_other_tokens_is_kept_in_a_cache_by_its_own(self, make_args, tmp_path, capsys):
        rows = [{"tokens": words, "labels": [0] * len(words)} for words in WORDS * 4]
        found = []
        for cache in ({}, {**CACHED, "teacher_cache_dir": str(tmp_path)}):
            args = make_args(per_device_train_batch_size=4, max_steps=2, remove_unused_columns=False, **cache)
            trainer = DistillationTrainer(
                model(STUDENT, 2, 0), args, WordAlignedCollator(STUDENT, TEACHER), rows,
                teacher_model=model(TEACHER, 3, 1),
            )  # fmt: skip
            trainer.train()
            found.append(dict(trainer.model.state_dict()))
        assert "of 8 rows in" in capsys.readouterr().out
        assert different_tensors(*found) == []


class TestSpans:
    def batch(self, answer="unhappy", **lengths):
        start = CONTEXT.index(answer) if answer else 0
        answers = {"text": [answer], "answer_start": [start]} if answer else {"text": [], "answer_start": []}
        collator = SpanAlignedCollator(STUDENT, TEACHER, **lengths)
        return collator([{"question": QUESTION, "context": CONTEXT, "answers": answers}])

    def test_probabilities_go_to_the_tokens_of_their_characters(self):
        batch = self.batch()
        # [CLS] who are un ##happy ? [SEP] songbirds are un ##happy [SEP]
        # [CLS] who are unhappy ? [SEP] song ##bird ##s are unhappy [SEP]
        start = [0, 1, 2, 3, 5, -1, 7, 7, 7, 8, 9, -1]
        end = [0, 1, 2, 4, 5, -1, 7, 7, 7, 8, 10, -1]
        assert batch["teacher_positions"][0].tolist() == [start, end]
        assert (batch["start_positions"].item(), batch["end_positions"].item()) == (9, 10)
        logits = torch.randn(1, 2, 12, dtype=torch.float64)
        moved = on_student_tokens(Activations(logits), batch).logits
        for side, places in enumerate((start, end)):
            kept = [i for i, place in enumerate(places) if place >= 0]
            share, expected = softmax(logits[0, side, kept].numpy()), np.zeros(12)
            for place, value in zip([places[i] for i in kept], share, strict=True):
                expected[place] += value
            np.testing.assert_allclose(softmax(moved[0, side].numpy()), expected, atol=1e-12)

    def test_no_answer_and_an_answer_that_was_cut_off(self):
        nothing, far = self.batch(answer=""), self.batch(max_length=9)
        assert (nothing["start_positions"].item(), nothing["end_positions"].item()) == (0, 0)
        assert (far["start_positions"].item(), far["end_positions"].item()) == (-100, -100)
        assert far["teacher_positions"][0, 0, 10].item() == -1  # the teacher's answer has no place either

    def test_spaces_before_byte_level_tokens_do_not_move_the_start(self):
        whole = byte_level(RobertaTokenizerFast)
        roberta = RobertaTokenizerFast(vocab=whole.get_vocab(), merges=_merges(whole), trim_offsets=False)
        bert, question, context = wordpiece(), "ba cofu", "di gel homix"
        batch = SpanAlignedCollator(bert, roberta)([{"question": question, "context": context}])
        encoded = roberta(question, context, return_offsets_mapping=True)
        for token, ((first, last), part) in enumerate(
            zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True)
        ):
            if part == 1:
                piece = context[first:last]
                char = first + len(piece) - len(piece.lstrip())
                mine = bert(question, context).char_to_token(char, sequence_index=1)
                assert batch["teacher_positions"][0, 0, token].item() == mine
        assert "start_positions" not in batch

    def test_identical_tokenizers_keep_the_teachers_distribution(self):
        tokens = wordpiece()
        row = {"question": "ba cofu", "context": "gelhom di ix", "answers": {"text": ["di"], "answer_start": [7]}}
        batch = SpanAlignedCollator(tokens, tokens)([row, {**row, "context": "ba"} | {"answers": None}])
        names = ["input_ids", "attention_mask", "token_type_ids"]
        assert all(torch.equal(batch[f"teacher_{name}"], batch[name]) for name in names)
        logits = torch.randn(2, 2, batch["input_ids"].shape[1])
        moved = on_student_tokens(Activations(logits), batch).logits
        same = (batch["teacher_positions"] >= 0) & batch["attention_mask"].bool()[:, None]
        for side in (0, 1):
            for row in (0, 1):
                kept = same[row, side]
                places = batch["teacher_positions"][row, side, kept]
                assert places.tolist() == kept.nonzero().flatten().tolist()
                torch.testing.assert_close(
                    moved[row, side, places].softmax(-1), logits[row, side, kept].softmax(-1), atol=1e-6, rtol=1e-5
                )
        assert batch["start_positions"].tolist()[1] == -100

    def test_a_student_learns_from_spans_of_other_tokens(self, make_args, tmp_path):
        rows = [
            {"question": QUESTION, "context": CONTEXT, "answers": {"text": ["songbirds"], "answer_start": [0]}},
            {"question": "who sing ?", "context": "unhappy are", "answers": {"text": [], "answer_start": []}},
        ] * 4  # fmt: skip
        found = []
        for cache in ({}, {**CACHED, "teacher_cache_dir": str(tmp_path)}):
            args = make_args(per_device_train_batch_size=4, max_steps=6, remove_unused_columns=False, **cache)
            trainer = DistillationTrainer(
                model(STUDENT, 2, 0, BertForQuestionAnswering), args, SpanAlignedCollator(STUDENT, TEACHER), rows,
                eval_dataset=rows, teacher_model=model(TEACHER, 3, 1, BertForQuestionAnswering),
            )  # fmt: skip
            before = trainer.evaluate()["eval_soft_loss"]
            trainer.train()
            assert trainer.evaluate()["eval_soft_loss"] < before
            found.append(dict(trainer.model.state_dict()))
        assert different_tensors(*found) == []


class TestPooledStates:
    def test_each_model_is_pooled_over_its_own_tokens(self, make_args):
        texts = ["unhappy songbirds are", "songbirds sing", "who are", "songbirds"] * 2
        data = datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 2, 0] * 2})
        losses = {"cka": CKALoss(), "infonce": ContrastiveLoss(pooling="first"), "lelp": LELPLoss(2, pooling="mean")}
        student, teacher = (
            model(tokens, layers, layers, BertForSequenceClassification)
            for tokens, layers in ((STUDENT, 2), (TEACHER, 3))
        )
        args = make_args(per_device_train_batch_size=4, max_steps=2, per_device_eval_batch_size=8)
        collator = TwoTokenizersCollator(STUDENT, TEACHER)
        trainer = DistillationTrainer(
            student, args, collator, data, eval_dataset=data, teacher_model=teacher, losses=losses
        )
        trainer.train()
        pooled = []
        for trained, tokens in ((student, STUDENT), (teacher, TEACHER)):
            with torch.no_grad():
                states = [
                    trained.eval()(**tokens(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
                    for text in texts
                ]
            x = torch.stack([state[0].mean(0) for state in states]).double().numpy()
            pooled.append(x - x.mean(0))
        x, y = pooled
        cka = np.sum((x.T @ y) ** 2) / np.sqrt(np.sum((x.T @ x) ** 2) * np.sum((y.T @ y) ** 2))
        assert trainer.evaluate()["eval_cka_loss"] == pytest.approx(1 - cka, abs=1e-4)


def test_what_is_not_aligned_is_refused(make_args):
    rows = [{"tokens": words, "labels": [0] * len(words)} for words in WORDS]
    texts = datasets.Dataset.from_dict({"text": ["unhappy songbirds"], "label": [0]})

    def build(collator, data, kind=BertForTokenClassification, **kwargs):
        models = model(STUDENT, 2, 0, kind), model(TEACHER, 3, 1, kind)
        args = make_args(remove_unused_columns=False)
        DistillationTrainer(models[0], args, collator, data, teacher_model=models[1], **kwargs)

    words = WordAlignedCollator(STUDENT, TEACHER)
    with pytest.raises(ValueError, match=r"aligns answers of kind 'rows', but the head is of kind 'tokens'.*WordAl"):
        build(TwoTokenizersCollator(STUDENT, TEACHER), texts)
    with pytest.raises(ValueError, match=r"aligns answers of kind 'tokens', but the head is of kind 'rows'"):
        build(words, rows, BertForSequenceClassification)
    for loss in (HiddenStateLoss({-1: -1}), CKALoss(), LELPLoss(2)):
        with pytest.raises(ValueError, match=r"the loss 'one' .* token by token"):
            build(words, rows, losses={"one": loss, "soft": SoftTargetLoss(), "hard": HardLabelLoss()})
    with pytest.raises(ValueError, match="3 words and 1 labels in 'labels'"):
        words([{"tokens": WORDS[0], "labels": [1]}])
    with pytest.raises(ValueError, match="no column 'tokens'"):
        words([{"words": WORDS[0]}])

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not tell which characters"):
        SpanAlignedCollator(STUDENT, Slow())
    nameless = copy.deepcopy(STUDENT)
    nameless.cls_token = None
    with pytest.raises(ValueError, match="has no CLS token, which stands for no answer"):
        SpanAlignedCollator(nameless, TEACHER)


def _merges(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
