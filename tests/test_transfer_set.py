"""Tasks read from raw rows, transfer sets, and the teacher's answers about them; the oracle is the teacher itself."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from test_vocabulary import CORPUS, trimmed

from hf_distill.activations import Needs
from hf_distill.tasks import Task, labels_at_first_tokens
from hf_distill.transfer import ImageRows, JudgedRows, build_transfer_set, judge
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


class TestTask:
    @pytest.mark.parametrize(
        ("model", "dataset", "kind", "inputs", "label"),
        [
            (bert(), labelled({"text": ["a", "b"], "id": ["x", "y"]}), "text", ("text",), "label"),
            (bert(), labelled({"a_review": ["a", "b"], "id": [1, 2]}), "text", ("a_review",), "label"),
            (bert(), labelled({"premise": ["a"], "hypothesis": ["b"]}), "text", ("premise", "hypothesis"), "label"),
            (
                bert("TokenClassification"),
                Dataset.from_dict({"id": ["1"], "words": [["a", "b"]], "ner_tags": [[0, 1]]}),
                "words", ("words",), "ner_tags",
            ),
            (vit(), labelled({"pixel_values": np.zeros((2, 1, 8, 8)).tolist()}), "image", ("pixel_values",), "label"),
        ],
    )  # fmt: skip
    def test_is_recognised_by_head_and_columns(self, model, dataset, kind, inputs, label):
        task = Task.of(model, dataset)
        assert (task.kind, task.inputs, task.label) == (kind, inputs, label)

    def test_regression_has_numbers(self):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": [1, 2]})
        task = Task.of(bert(num_labels=1), rows)
        assert task.classes == ()
        assert task.labels(rows) == [1.0, 2.0]

    def test_classes_are_matched_by_name(self):
        rows = labelled({"text": ["ba", "co"]}, names=("yes", "no"))
        model = bert(id2label={0: "No", 1: "Yes"}, label2id={"No": 0, "Yes": 1})
        assert Task.of(model, rows).labels(rows) == [1, 0]

    def test_labels_stand_at_the_first_token_of_their_word(self):
        assert labels_at_first_tokens([None, 0, 1, 1, 1, 2, None], [4, 5, 6]) == [-100, 4, 5, -100, -100, 6, -100]

    @pytest.mark.parametrize(
        ("model", "columns", "given", "message"),
        [
            (bert(), {"one": ["a"], "two": ["b"]}, {}, r"cannot be told: \['one', 'two'\] would do"),
            (bert(), {"text": ["a"]}, {"input_columns": "body"}, r"input_columns=\['body'\] must be columns"),
            (bert(), {"text": ["a"]}, {"label_column": "class"}, "label_column='class' is no column"),
            (bert("QuestionAnswering"), {"text": ["a"]}, {}, "BertForQuestionAnswering does not classify"),
            (bert(problem_type="multi_label_classification"), {"text": ["a"]}, {}, "gives several labels a row"),
        ],
    )
    def test_what_cannot_be_told_is_refused(self, model, columns, given, message):
        with pytest.raises(ValueError, match=message):
            Task.of(model, labelled(columns), **given)

    def test_splits_and_streams_are_no_rows(self):
        rows = labelled({"text": ["ba", "co"]})
        for wrong in (DatasetDict(train=rows), rows.to_iterable_dataset()):
            with pytest.raises(ValueError, match=r"must be a datasets\.Dataset"):
                Task.of(bert(), wrong)

    def test_classes_that_the_teacher_does_not_know_are_refused(self):
        rows = labelled({"text": ["ba", "co"]}, names=("good", "bad"))
        model = bert(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        with pytest.raises(ValueError, match=r"it does not know \['bad', 'good'\]"):
            Task.of(model, rows).labels(rows)

    def test_labels_may_be_the_names_themselves(self):
        model = bert("TokenClassification", id2label={0: "O", 1: "B"}, label2id={"O": 0, "B": 1})
        words = Dataset.from_dict({"tokens": [["ba", "co"], []], "tags": [["b", "O"], []]})
        assert Task.of(model, words).labels(words) == [[1, 0], []]
        names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": ["Yes", "no"]})
        assert Task.of(bert(**names), rows).labels(rows) == [1, 0]
        with pytest.raises(ValueError, match=r"holds \['Yes', 'no'\], but the teacher's classes are \['LABEL_0'"):
            Task.of(bert(), rows).labels(rows)

    @pytest.mark.parametrize("named", [False, True])
    def test_classes_that_differ_in_case_alone_are_told_apart(self, named):
        names = {"id2label": {0: "a", 1: "A", 2: "b"}, "label2id": {"a": 0, "A": 1, "b": 2}, "num_labels": 3}
        rows = Dataset.from_dict({"text": ["ba", "co", "di"], "label": ["A", "a", "B"]})
        rows = rows.cast_column("label", ClassLabel(names=["B", "A", "a"])) if named else rows
        assert Task.of(bert(**names), rows).labels(rows) == [1, 0, 2]

    def test_numbers_that_were_read_as_text_are_numbers(self):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": ["1", "0"]})
        assert Task.of(bert(), rows).labels(rows) == [1, 0]
        stars = {"id2label": {0: "2", 1: "1", 2: "0"}, "label2id": {"2": 0, "1": 1, "0": 2}, "num_labels": 3}
        assert Task.of(bert(**stars), rows).labels(rows) == [1, 2]  # names that are digits are names
        with pytest.raises(ValueError, match=r"holds \['1', '2'\], but the teacher's classes are"):
            Task.of(bert(), rows).labels(Dataset.from_dict({"text": ["ba", "co"], "label": ["1", "2"]}))

    @pytest.mark.parametrize("outputs", [2, 1])
    def test_several_labels_a_row_are_refused(self, outputs):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": [[1.0, 0.0], [0.0, 1.0]]})
        with pytest.raises(ValueError, match="'label' holds several labels or numbers a row"):
            Task.of(bert(num_labels=outputs), rows).labels(rows)

    def test_a_word_without_a_label_is_refused(self):
        rows = Dataset.from_dict({"tokens": [["ba"], ["co", "di"]], "tags": [[0], [1]]})
        with pytest.raises(ValueError, match="Row 1 has 2 words, but 1 labels"):
            Task.of(bert("TokenClassification"), rows).encode(rows, trimmed("wordpiece")[0])

    @pytest.mark.parametrize(
        ("column", "expected"), [([-1, 1], [-100, 1]), ([0.0, 1.0], [0, 1]), ([True, False], [1, 0])]
    )
    def test_labels_are_whole_numbers_and_hidden_ones_are_ignored(self, column, expected):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": column})
        for dataset in (rows, rows.with_format("torch")):
            found = Task.of(bert(), dataset).labels(dataset)
            assert found == expected
            assert {type(label) for label in found} == {int}

    @pytest.mark.parametrize("label", [None, 0.5])
    def test_labels_that_are_none_or_between_classes_are_refused(self, label):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": [label, 1]})
        with pytest.raises(ValueError, match=f"'label' holds {label}"):
            Task.of(bert(), rows).labels(rows)

    def test_labels_out_of_range_are_refused(self):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": [0, 7]})
        with pytest.raises(ValueError, match="holds 7, but the teacher has the classes 0 to 1"):
            Task.of(bert(), rows).labels(rows)


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
        new = [row for row in made if row["source"] not in ("task", "unlabelled")]
        assert {row["source"] for row in new} == {"recombine", "drop_words"}
        assert len(new) > 50
        assert {word for row in new for word in row["text"].split()} <= {w for t in CORPUS[:30] for w in t.split()}

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


class TestImageRows:
    ROWS = Dataset.from_dict(
        {"pixel_values": np.random.default_rng(0).random((6, 1, 8, 8)).tolist(), "label": [0, 1] * 3},
        Features({"pixel_values": List(List(List(Value("float32")))), "label": Value("int64")}),
    )
    TASK = Task.of(vit(), ROWS)

    def test_the_first_view_is_the_image_and_each_is_read_the_same_again(self):
        rows = ImageRows(self.TASK, self.ROWS, None, views=3)
        assert len(rows) == 18
        for k in range(18):
            assert torch.equal(rows[k]["pixel_values"], rows[k]["pixel_values"])
        for k, image in enumerate(self.ROWS["pixel_values"]):
            assert torch.equal(rows[k]["pixel_values"], torch.tensor(image))

    def test_every_second_view_lies_between_two_images(self):
        rows = ImageRows(self.TASK, self.ROWS, None, views=3)
        known = set(np.asarray(self.ROWS["pixel_values"], np.float32).ravel().tolist())
        shifted = {float(x) for k in range(6, 12) for x in rows[k]["pixel_values"].ravel()}
        mixed = {float(x) for k in range(12, 18) for x in rows[k]["pixel_values"].ravel()}
        assert shifted <= known
        assert not mixed <= known
        assert min(known) <= min(mixed)
        assert max(mixed) <= max(known)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
    def test_pictures_of_any_mode_are_read_whatever_transform_is_set(self, mode):
        colours = np.random.default_rng(0).integers(0, 255, (2, 10, 12, 3), np.uint8)
        pictures = [Image.fromarray(array).convert(mode) for array in colours]
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1]}).cast_column("image", datasets.Image())
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8})
        expected = reader(pictures[1].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        for dataset in (rows, rows.with_transform(lambda some: {"label": some["label"]})):
            found = ImageRows(Task.of(vit(), dataset), dataset, reader)[1]
            torch.testing.assert_close(found["pixel_values"], expected)
            assert found["labels"] == 1

    @pytest.mark.parametrize("mode", ["RGB", "LA", "L"])
    def test_a_reader_of_one_channel_gets_grey_pictures(self, mode):
        colours = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
        pictures = [Image.fromarray(array).convert(mode) for array in colours]
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1]}).cast_column("image", datasets.Image())
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
        found = ImageRows(Task.of(vit(), rows), rows, reader)[1]["pixel_values"].squeeze()
        grey = torch.tensor(np.asarray(pictures[1].convert("L"), np.float32))
        torch.testing.assert_close(found, grey / 255 / 0.5 - 1, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("decode", [True, False])
    def test_pictures_that_are_not_there_or_not_decoded_are_refused(self, decode):
        picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
        rows = Dataset.from_dict({"image": [None if decode else picture], "label": [0]})
        rows = rows.cast_column("image", datasets.Image()).cast_column("image", datasets.Image(decode=decode))
        with pytest.raises(ValueError, match="Row 0 of 'image' holds no decoded image, got"):
            ImageRows(Task.of(vit(), rows), rows, hf.ViTImageProcessor(size={"height": 8, "width": 8}))[0]

    def test_pictures_may_be_arrays(self):
        arrays = np.random.default_rng(0).integers(0, 255, (2, 10, 12, 3), np.uint8)
        rows = Dataset.from_dict({"image": arrays.tolist(), "label": [0, 1]})
        reader = hf.ViTImageProcessor(size={"height": 8, "width": 8}, resample=0)
        expected = reader(Image.fromarray(arrays[0]), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ImageRows(Task.of(vit(), rows), rows, reader)[0]["pixel_values"], expected)

    def test_labels_come_only_with_the_images_themselves(self):
        assert ImageRows(self.TASK, self.ROWS, None)[1]["labels"] == 1
        assert "labels" not in ImageRows(self.TASK, self.ROWS, None, views=2)[1]

    @pytest.mark.parametrize("limit", ["bytes", "free memory", "free memory of two workers"])
    @pytest.mark.parametrize("images", [0, 4, 6])
    def test_as_many_images_as_there_is_room_for_are_processed_once_and_never_changed(
        self, images, limit, monkeypatch
    ):
        read = [row["pixel_values"] for row in ImageRows(self.TASK, self.ROWS, None, views=3)]
        room = images * 8 * 8 * 4 + 1
        if limit == "bytes":
            monkeypatch.setattr("hf_distill.transfer.views.KEPT_BYTES", room)
        else:
            workers = SimpleNamespace(num_workers=2) if "workers" in limit else None
            monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: workers)
            free = SimpleNamespace(available=8 * room * (2 if workers else 1))
            monkeypatch.setattr("psutil.virtual_memory", lambda: free)
        whole, processed = ImageRows._processed, []
        monkeypatch.setattr(ImageRows, "_processed", lambda self, row: processed.append(row) or whole(self, row))
        rows = ImageRows(self.TASK, self.ROWS, None, views=3)
        for _ in range(2):
            for k in range(len(rows)):
                assert torch.equal(rows[k]["pixel_values"], read[k])
        assert sorted(row for row in range(6) if processed.count(row) == 1) == list(range(images))
