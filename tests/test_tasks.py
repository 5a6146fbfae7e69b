"""Tasks read from raw rows: what the columns are taken for, and what is refused."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Sequence
from test_transfer_set import bert, labelled, vit
from test_vocabulary import trimmed

from hf_distill.tasks import Task, labels_at_first_tokens

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


class TestTask:
    @pytest.mark.parametrize(
        ("model", "dataset", "kind", "inputs", "label"),
        [
            (bert(), labelled({"text": ["a", "b"], "id": ["x", "y"]}), "text", ("text",), "label"),
            (bert(), labelled({"a_review": ["a", "b"], "id": [1, 2]}), "text", ("a_review",), "label"),
            (bert(), labelled({"premise": ["a"], "hypothesis": ["b"]}), "text", ("premise", "hypothesis"), "label"),
            (bert(), labelled({"text": ["a"], "text_pair": ["b"]}), "text", ("text", "text_pair"), "label"),
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

    def test_whole_numbers_of_a_regression_stay_floats_whatever_their_column_is_called(self):
        reader = trimmed("wordpiece")[0]
        for name in ("label", "labels"):
            rows = Dataset.from_dict({"text": ["ba", "co"], name: [1, 2]})
            encoded = Task.of(bert(num_labels=1), rows).encode(rows, reader)
            assert encoded.features["labels"].dtype.startswith("float")

    @pytest.mark.parametrize(("outputs", "column"), [(1, "score"), (2, "label")])
    def test_numbers_are_what_a_regression_predicts_and_names_what_a_classifier_does(self, outputs, column):
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": ["high", "low"], "score": [0.7, 0.1]})
        assert Task.of(bert(num_labels=outputs), rows).label == column

    @pytest.mark.parametrize("named", [False, True])
    @pytest.mark.parametrize(("column", "classes"), [("pos_tags", "NVDP"), ("ner_tags", "OB")])
    def test_of_several_columns_of_labels_the_teachers_is_read(self, column, classes, named):
        """As CoNLL has them; the order of the columns and of the names looked for must not decide."""
        names = {"ner_tags": list("OB"), "pos_tags": list("NVDP")}
        rows = {"tokens": [["a", "b"]] * 4, "ner_tags": [[0, 1]] * 4, "pos_tags": [[0, 1], [2, 2], [0, 2], [3, 0]]}
        dataset = Dataset.from_dict(rows)
        for name in names if named else ():
            dataset = dataset.cast_column(name, Sequence(ClassLabel(names=names[name])))
        given = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
        assert Task.of(bert("TokenClassification", **given), dataset).label == column

    def test_fine_and_coarse_classes_are_told_apart(self):
        rows = {"text": ["a", "b", "c"], "fine_label": [0, 4, 2], "coarse_label": [0, 1, None]}
        dataset = Dataset.from_dict(rows)
        assert Task.of(bert(num_labels=2), dataset).label == "coarse_label"
        assert Task.of(bert(num_labels=5), dataset).label == "fine_label"

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

    def test_a_class_may_be_called_minus_one_and_numbers_may_have_become_floats(self):
        three = {"id2label": {0: "-1", 1: "0", 2: "1"}, "label2id": {"-1": 0, "0": 1, "1": 2}, "num_labels": 3}
        rows = Dataset.from_dict({"text": ["ba", "co", "di"], "label": [-1, 1, 0]})
        assert Task.of(bert(**three), rows).labels(rows) == [0, 2, 1]
        stars = {"id2label": {0: "1", 1: "2", 2: "3"}, "label2id": {"1": 0, "2": 1, "3": 2}, "num_labels": 3}
        rows = Dataset.from_dict({"text": ["ba", "co"], "label": [1.0, 2.0]})
        assert Task.of(bert(**stars), rows).labels(rows) == [0, 1]

    @pytest.mark.parametrize("outputs", [2, 1])
    def test_several_labels_a_row_are_refused_where_the_teacher_gives_one(self, outputs):
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


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (["0", "1", "10", "2"], [0, 1, 2, 10], [0, 1, 3, 2]),  # sorted as texts
        (["True", "False"], [True, False], [0, 1]),
        (["1", "2", "3"], [1, 2, -100], [0, 1, -100]),
        (["0", "1"], [1, 0], [1, 0]),
        (["1", "2"], [-1, -100], [-100, -100]),
        (["no", "yes"], [1, 0], [1, 0]),
        (["LABEL_0", "LABEL_1"], [1, 0], [1, 0]),
    ],
)
def test_numbers_that_are_the_names_of_classes_are_read_by_name(names, values, expected):
    """As where the same column was read as text."""
    rows = Dataset.from_dict({"text": ["a"] * len(values), "label": values})
    teacher = bert(id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)})
    assert Task.of(teacher, rows).labels(rows) == expected


def test_a_negative_number_is_no_name_of_a_class_either():
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, -5]})
    teacher = bert(id2label={0: "1", 1: "2"}, label2id={"1": 0, "2": 1})
    with pytest.raises(ValueError, match=r"'label' holds -5"):
        Task.of(teacher, rows).labels(rows)
