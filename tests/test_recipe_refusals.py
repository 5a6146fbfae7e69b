"""What `compress` refuses before it costs anything."""

import copy

import pytest
import torch
import transformers as hf
from datasets import Dataset
from test_recipe import ROWS, SIZES, make
from test_transfer_set import bert, labelled, vit
from test_vocabulary import CORPUS, original

from hf_distill.recipes import STAGES, Stage, compress

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training_rows": 0}, "training_rows must be at least 1"),
        (
            {
                "rows": Dataset.from_dict({"text": CORPUS[:4]}),
                "stages": (Stage("labels", "task", 1.0, 1e-3, hard_label_weight=1.0),),
            },
            "No column of .* holds labels",
        ),
        ({"max_parameters": 10_000, "compression": 3}, "both limit the size"),
        ({"min_confidence": 1.5}, "nowhere as confident as"),
        ({"compression": 1000}, "No student of at most .* in compress by student=create_student"),
        ({"student": bert()}, "compression is the size of a student to make"),
        ({"student": bert(vocab_size=100), "compression": None}, "has 100 tokens, but reads the teacher's 305"),
        ({"student": bert(num_labels=3), "compression": None}, "The student's classes are .*LABEL_2"),
        (
            {"student": bert(id2label={0: "b", 1: "a"}, label2id={"b": 0, "a": 1}), "compression": None},
            "The student's classes are {0: 'b', 1: 'a'}",
        ),
        ({"rows": ROWS.select([])}, "train_dataset has no rows"),
        ({"exclude": CORPUS[:40]}, "training rows are among those that must not be learnt from"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"augmented_rows": -5}, "augmented_rows must be at least 0, got -5"),
        ({"stages": ()}, r"stages must be one at least, .* got \[\]"),
        ({"stages": 2 * STAGES[:1]}, r"a name of its own, got \['transfer', 'transfer'\]"),
        (
            {"arguments": {"num_train_epochs": 1}},
            "num_train_epochs has no place in `arguments`. Set training_rows",
        ),
        (
            {"teacher": vit(), "rows": labelled({"image": torch.rand(2, 8, 8).tolist()}, None), "reader": None},
            "processing_class must be the teacher's image processor, got NoneType",
        ),
        ({"reader": None}, "processing_class must be the teacher's tokenizer, got NoneType"),
        ({"teacher": bert(vocab_size=100)}, "has ids up to 299, the teacher 100 embeddings"),
        (
            {
                "teacher": vit(),
                "rows": labelled({"pixel_values": torch.rand(2, 1, 8, 8).tolist()}, None),
                "exclude": ["a"],
            },
            "exclude is for texts and words",
        ),
        (
            {
                "teacher": vit(),
                "rows": labelled({"pixel_values": torch.rand(2, 1, 8, 8).tolist()}, None),
                "unlabelled": ["a"],
            },
            "unlabelled is for texts and words",
        ),
    ],
)
def test_mistakes_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **given)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    reader = copy.deepcopy(original("wordpiece"))
    reader.pad_token = None
    with pytest.raises(ValueError, match="no padding token, which batches need"):
        compress(bert(**SIZES), reader, ROWS, tmp_path)


def test_several_gpus_are_refused_before_the_teacher_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"1 processes and 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        make(tmp_path)


@pytest.mark.parametrize("name", ["start", "transfer"])
def test_files_of_others_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else, which would be lost"):
        make(tmp_path)
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"
