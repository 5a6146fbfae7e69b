"""Transfer sets, and the teacher's answers about them; the oracle is the teacher itself."""

import re

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, List, Value
from test_vocabulary import CORPUS, original, trimmed

from hf_distill.activations import Needs
from hf_distill.tasks import Task
from hf_distill.transfer import JudgedRows, build_transfer_set, judge
from hf_distill.transfer.augment import text_of, words_of
from hf_distill.transfer.places import places, same_characters

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def bert(kind="SequenceClassification", **config):
    torch.manual_seed(0)
    entries = {"vocab_size": 305, "max_position_embeddings": 60, **SIZES, **config}
    return getattr(hf, f"BertFor{kind}")(hf.BertConfig(**entries)).eval()


def vit():
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES)).eval()


def labelled(columns, names=("no", "yes"), name="label"):
    content = {**columns, name: [k % 2 for k in range(len(next(iter(columns.values()))))]}
    dataset = Dataset.from_dict(content)
    return dataset.cast_column(name, ClassLabel(names=list(names))) if names else dataset


class TestBuildTransferSet:
    ROWS = Dataset.from_dict({"text": CORPUS[:30], "label": [0] * 30})

    def test_holds_every_row_once_and_none_of_the_excluded(self):
        held_out = CORPUS[5:8]
        unlabelled = [*CORPUS[28:40], "zebra"]
        made = build_transfer_set(self.ROWS, "text", unlabelled=unlabelled, exclude=held_out, augmented_rows=50)
        assert len(set(made["text"])) == len(made)
        assert not set(made["text"]) & set(held_out)
        assert {*CORPUS[:40], "zebra"} - set(held_out) <= set(made["text"])

    def test_new_texts_are_made_of_the_words_of_the_task(self):
        made = build_transfer_set(self.ROWS, "text", augmented_rows=100)
        new = made.filter(lambda row: row["source"] not in ("task", "unlabelled"))
        assert set(new["source"]) == {"recombine", "drop_words"}
        assert len(new) > 50
        words = re.compile(r"[中文]|[^\s中文]+")  # a character each, where there are no spaces
        assert set(words.findall(" ".join(new["text"]))) <= set(words.findall(" ".join(CORPUS[:30])))

    @pytest.mark.parametrize(
        "text",
        [
            "这部电影非常好看、但是有点太长了。演员不好、故事也无聊。",
            "この映画はとても面白いです。でも、少し長すぎました。",
            "ภาพยนตร์เรื่องนี้ดีมาก แต่ยาวเกินไปหน่อย",
        ],
    )
    def test_texts_without_spaces_are_taken_apart_too(self, text):
        made = build_transfer_set(Dataset.from_dict({"text": [text]}), "text", augmented_rows=60)["text"][1:]
        assert len(made) > 30  # each row stands there once
        assert set("".join(made)) <= set(text)

    @pytest.mark.parametrize(
        "text",
        [
            "ร้านนี้ดีมากค่ะ แต่ราคา 3.5 บาท",
            "USB接口坏了,换了3个",
            '他说"好"。(好)',
            "𠮷野家で食べた",
            "東京 大阪 Tōkyō!",
            "a (fine) film",
        ],
    )
    def test_a_text_that_is_taken_apart_and_put_together_is_the_same(self, text):
        assert text_of(words_of(text)) == text

    def test_short_texts_make_as_many_rows_as_long_ones_where_they_can(self, capsys):
        rows = Dataset.from_dict({"text": [f"{a} {b} {c}" for a in "abcd" for b in "efgh" for c in "ijkl"]})
        made = build_transfer_set(rows, "text", augmented_rows=300)
        assert len(made) > 64 + 270
        assert not capsys.readouterr().out

    def test_it_is_told_where_there_are_no_more(self, capsys):
        assert len(build_transfer_set(Dataset.from_dict({"text": ["a"]}), "text", augmented_rows=90)) == 3
        assert "2 new rows of the 90 asked for" in capsys.readouterr().out

    def test_the_seed_decides(self):
        one, same, other = (build_transfer_set(self.ROWS, "text", seed=seed)["text"] for seed in (0, 0, 1))
        assert list(one) == list(same) != list(other)

    def test_of_a_pair_one_side_stays(self):
        rows = Dataset.from_dict(
            {"a": [f"one {k} two, three" for k in range(9)], "b": [f"x {k}, y" for k in range(9)]}
        )
        made = build_transfer_set(rows, ["a", "b"], augmented_rows=40)
        for row in made:
            assert row["a"] in rows["a"] or row["b"] in rows["b"]

    def test_texts_that_belong_together_stay_so_but_where_several_make_one(self):
        """Both sides of row k hold the word of k; only recombined clauses have no row of their own."""
        numbers = [f"n{k}" for k in range(50)]
        rows = Dataset.from_dict(
            {"a": [f"{n} {n} {n} {n}" for n in numbers], "b": [f"{n} x {n} x {n}" for n in numbers]}
        )
        made = build_transfer_set(rows, ["a", "b"], augmented_rows=300)
        shared = {"drop_words": [], "recombine": []}
        for row in made:
            if row["source"] in shared:
                one, two = ({word for word in row[side].split() if word != "x"} for side in "ab")
                shared[row["source"]].append(bool(one & two) or not one or not two)
        assert len(shared["drop_words"]) > 20
        assert all(shared["drop_words"])
        assert not all(shared["recombine"])

    def test_rows_of_a_stream_are_read_by_their_columns(self):
        pairs = Dataset.from_dict({"a": ["one", "two"], "b": ["x", "y"]})
        more = Dataset.from_dict({"b": ["z", "y"], "id": [7, 8], "a": ["three", "two"]}).to_iterable_dataset()
        made = build_transfer_set(pairs, ["a", "b"], unlabelled=more, augmented_rows=0)
        assert list(zip(made["a"], made["b"], strict=True)) == [("one", "x"), ("two", "y"), ("three", "z")]

    def test_lists_of_words_stay_lists(self):
        rows = Dataset.from_dict({"tokens": [text.split() for text in CORPUS[:9]]})
        made = build_transfer_set(rows, "tokens", augmented_rows=9)
        assert made.features["tokens"] == List(Value("string"))
        assert len(made) > 9

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"input_columns": "body"}, "input_columns"),
            ({"augment": ["back_translation"]}, "augment must name some of"),
            ({"unlabelled": "one text"}, "got one text"),
            ({"unlabelled": [{"body": "a"}]}, "lack the column 'text'"),
            ({"exclude": DatasetDict(test=Dataset.from_dict({"text": ["a"]}))}, r"DatasetDict with \['test'\]"),
            ({"unlabelled": Dataset.from_dict({"body": ["a"]})}, "lack the column 'text'"),
            ({"unlabelled": [["a", "b"]]}, r"unlabelled: row 0 must be a text, got \['a', 'b'\]"),
            ({"exclude": ["a", None]}, "exclude: row 1 must be a text, got None"),
        ],
    )
    def test_mistakes_are_refused(self, given, message):
        with pytest.raises(ValueError, match=message):
            build_transfer_set(self.ROWS, **{"input_columns": "text", **given})

    @pytest.mark.parametrize(
        ("columns", "given", "message"),
        [
            ({"a": ["ba", "co"], "b": ["di", "fu"]}, {"unlabelled": ["hello"]}, r"must be a pair \(a, b\) of texts"),
            ({"tokens": [["ba"], ["co"]]}, {"unlabelled": ["hello"]}, "must be a list of words, got 'hello'"),
            ({"tokens": [["ba"], [None]]}, {}, r"The dataset: row 1 must be a list of words, got \[None\]"),
            ({"text": ["ba", None]}, {}, "The dataset: row 1 must be a text, got None"),
        ],
    )
    def test_rows_of_another_kind_are_refused(self, columns, given, message):
        with pytest.raises(ValueError, match=message):
            build_transfer_set(Dataset.from_dict(columns), list(columns), **given)


class TestJudgedRows:
    def test_texts_bring_the_teachers_logits_and_first_states(self, tmp_path):
        old, new = trimmed("wordpiece")
        rows = Dataset.from_dict({"text": CORPUS[:20]})
        teacher = bert()
        task = Task.of(teacher, rows)
        needs = Needs(logits=True, hidden_states=(2,))
        judgement = judge(
            task.encode(rows, old),
            teacher,
            task.collator(old),
            needs,
            tmp_path,
            state_positions="first",
            progress=False,
        )
        judged = JudgedRows(task.encode(rows, new), judgement)
        for k, text in enumerate(CORPUS[:20]):
            with torch.no_grad():
                expected = teacher(**old(text, return_tensors="pt"), output_hidden_states=True)
            torch.testing.assert_close(judged[k]["teacher_logits"], expected.logits[0], rtol=1e-5, atol=1e-6)
            state = judged[k]["teacher_hidden_states_2"].float()
            torch.testing.assert_close(state, expected.hidden_states[-1][0, :1], rtol=2e-3, atol=2e-3)
            assert judged[k]["input_ids"] == new(text)["input_ids"]

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_a_teacher_is_asked_where_it_is_wished_and_comes_back(self, device, tmp_path):
        teacher, rows, reader = bert(), Dataset.from_dict({"text": CORPUS[:9]}), original("wordpiece")
        task, asked = Task.of(teacher, rows), set()
        teacher.register_forward_hook(lambda module, args, output: asked.add(output.logits.device.type))
        judgement = judge(
            task.encode(rows, reader), teacher, task.collator(reader), Needs(logits=True), tmp_path,
            device=torch.device(device), progress=False,
        )  # fmt: skip
        assert asked == {device}
        assert teacher.device.type == "cpu"
        with torch.no_grad():
            expected = teacher(**reader(CORPUS[0], return_tensors="pt")).logits[0]
        torch.testing.assert_close(judgement.answers(0)["teacher_logits"], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("columns", [("text",), ("question", "sentence")])
    def test_tokens_of_texts_bring_the_state_of_the_teachers_token_that_holds_their_first_character(
        self, tmp_path, columns
    ):
        old, new = trimmed("wordpiece")
        rows = Dataset.from_dict({name: CORPUS[5 * k : 5 * k + 12] for k, name in enumerate(columns)})
        teacher = bert()
        task = Task.of(teacher, rows)
        judgement = judge(
            task.encode(rows, old, 16), teacher, task.collator(old), Needs(logits=True, hidden_states=(2,)), tmp_path,
            progress=False,
        )  # fmt: skip
        judged = JudgedRows(task.encode(rows, new, 16), judgement, places=places(task, rows, new, old, 16))
        different = 0
        for k in range(len(rows)):
            texts = [rows[k][name] for name in columns]
            theirs, ours = (r(*texts, truncation=True, max_length=16, return_tensors="pt") for r in (old, new))
            with torch.no_grad():
                said = teacher(**theirs, output_hidden_states=True)
            states = judged[k]["teacher_hidden_states_2"].float()
            assert len(states) == len(judged[k]["input_ids"])
            torch.testing.assert_close(judged[k]["teacher_logits"], said.logits[0], rtol=1e-5, atol=1e-6)
            sides = theirs.sequence_ids()
            for place, side in enumerate(ours.sequence_ids()):
                there = 0 if place == 0 else len(sides) - 1
                if side is not None:
                    found = theirs.char_to_token(0, ours.token_to_chars(0, place).start, side)
                    there = max(i for i, s in enumerate(sides) if s == side) if found is None else found
                    different += there != place
                expected = said.hidden_states[-1][0, there]
                torch.testing.assert_close(states[place], expected, rtol=2e-3, atol=2e-3)
        assert different

    def test_what_the_teacher_has_cut_off_is_answered_by_its_last_token_of_that_text(self):
        assert same_characters([None, (0, 0), (0, 9), (1, 0), None], [None, (0, 0), (0, 4), None]) == [0, 1, 2, 3, 3]

    def test_words_bring_the_answer_about_their_first_token(self, tmp_path):
        old, new = trimmed("wordpiece")
        rows = Dataset.from_dict({"tokens": [text.split() for text in CORPUS[:12]]})
        teacher = bert("TokenClassification")
        task = Task.of(teacher, rows)
        judgement = judge(
            task.encode(rows, old), teacher, task.collator(old), Needs(logits=True), tmp_path, progress=False
        )
        judged = JudgedRows(task.encode(rows, new), judgement, places=places(task, rows, new, old, None))
        different = 0
        for k, row in enumerate(rows["tokens"]):
            theirs, ours = (reader(row, is_split_into_words=True, return_tensors="pt") for reader in (old, new))
            different += theirs["input_ids"].shape != ours["input_ids"].shape
            with torch.no_grad():
                logits = teacher(**theirs).logits[0]
            for place, word in enumerate(ours.word_ids()):
                first = theirs.word_ids().index(word) if place < len(ours.word_ids()) - 1 else len(logits) - 1
                torch.testing.assert_close(judged[k]["teacher_logits"][place], logits[first], rtol=1e-5, atol=1e-6)
        assert different  # else nothing was aligned

    def test_confidence_is_the_largest_probability(self, tmp_path):
        old, _ = trimmed("wordpiece")
        rows, teacher = Dataset.from_dict({"text": CORPUS[:5]}), bert()
        task = Task.of(teacher, rows)
        judged = judge(
            task.encode(rows, old), teacher, task.collator(old), Needs(logits=True), tmp_path, progress=False
        )
        with torch.no_grad():
            expected = [
                teacher(**old(text, return_tensors="pt")).logits.softmax(-1).max().item() for text in CORPUS[:5]
            ]
        np.testing.assert_allclose(judged.confidence(), expected, rtol=1e-5)


def test_a_column_of_texts_may_be_called_source():
    rows = Dataset.from_dict({"source": ["a fine film, if long", "too loud"], "target": ["yes", "no"]})
    made = build_transfer_set(rows, ["source", "target"], augmented_rows=4)
    assert made["source"][:2] == rows["source"][:]
    assert made["target"][:2] == rows["target"][:]
    assert made["transfer_source"][:2] == ["task", "task"]
