"""What two models must agree on, and what is put right where they need not."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from parity import different_tensors
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast, Qwen2Config

from hf_distill.alignment import check_image_processors, class_order, shared_vocabulary
from hf_distill.testing import VOCABULARY, tiny_task

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["hello", "world", "two", "spaces", "don", "t", "stop", "now", *(f"word{i}" for i in range(24))]


def make_tokenizer(words=WORDS, lowercase=True, **kwargs):
    """A whole-word tokenizer of 5 + 32 = VOCABULARY tokens."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens, **kwargs)


def trained(task, make_trainer, steps=2, **kwargs):
    """The student's weights after some steps, in float64 so that only the mathematics counts."""
    task.student.double(), task.teacher.double()
    make_trainer(task, max_steps=steps, **kwargs).train()
    return dict(task.student.state_dict())


def warnings_of(caplog, text):
    return [r for r in caplog.records if r.name.startswith("hf_distill") and text in r.getMessage()]


# ---- Classes ----


@pytest.mark.parametrize(
    ("student", "teacher", "order"),
    [
        ({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "b", 2: "c"}, None),
        ({0: "a", 1: "b", 2: "c"}, {0: "c", 1: "a", 2: "b"}, (1, 2, 0)),
        ({0: "c", 1: "a", 2: "b"}, {0: "a", 1: "b", 2: "c"}, (2, 0, 1)),
        ({"1": "b", "0": "a"}, {0: "b", 1: "a"}, (1, 0)),  # JSON keys, out of order
        ({str(i): f"n{i}" for i in range(11)}, {i: f"n{i}" for i in range(11)}, None),  # "10" comes after "9"
    ],
)
def test_class_order_finds_each_class_by_name(student, teacher, order):
    assert class_order(student, teacher) == order


@pytest.mark.parametrize("name", ["single_label", "multi_label", "token", "image"])
def test_a_permuted_label2id_gives_the_same_student(name, make_trainer):
    results = {}
    for case in ("as it is", "permuted", "permuted without its names"):
        task = tiny_task(name)
        if case != "as it is":
            order = [2, 0, 1]  # the teacher's new class i is its old class order[i]
            for parameter in task.teacher.classifier.parameters():
                parameter.data = parameter.data[order].clone()
            if case == "permuted":
                names = [task.teacher.config.id2label[i] for i in order]
                task.teacher.config.id2label = dict(enumerate(names))
                task.teacher.config.label2id = {name: index for index, name in enumerate(names)}
        results[case] = trained(task, make_trainer)
    assert different_tensors(results["permuted"], results["as it is"], 1e-12) == []
    assert different_tensors(results["permuted without its names"], results["as it is"], 1e-4)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_unnamed_labels_are_taken_in_order_with_one_warning(side, make_trainer, caplog):
    task, named = tiny_task("single_label"), tiny_task("single_label")
    config = getattr(task, side).config
    config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    config.label2id = {f"LABEL_{i}": i for i in range(3)}
    weights = trained(task, make_trainer)
    assert len(warnings_of(caplog, "Labels are unnamed")) == 1
    assert different_tensors(weights, trained(named, make_trainer), 0.0) == []


def test_labels_of_the_same_names_are_silent(make_trainer, caplog):
    make_trainer(tiny_task("single_label"))
    assert warnings_of(caplog, "label") == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "d"], r"different labels: only the student has \['c'\], only the teacher \['d'\]"),
        (["A", "b", "c"], r"different labels.*matched exactly"),
        (["a", "b", "LABEL_2"], "different labels"),
        (["a", "a", "c"], "different labels"),
        (["a", "b"], r"student has 3 labels \['a', 'b', 'c'\], the teacher 2 \['a', 'b'\]"),
        (["a", "b", "c", "d"], "student has 3 labels .*, the teacher 4"),
    ],
)
@pytest.mark.parametrize("task_name", ["single_label", "token"])
def test_different_label_sets_are_refused(task_name, names, message, make_trainer):
    task = tiny_task(task_name)
    task.teacher.config.id2label = dict(enumerate(names))
    with pytest.raises(ValueError, match=message):
        make_trainer(task)


def test_labels_named_twice_on_both_sides_are_refused():
    with pytest.raises(ValueError, match="must be unique"):
        class_order({0: "a", 1: "a", 2: "b"}, {0: "b", 1: "a", 2: "a"})


# ---- Heads ----


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ("single_label", "token", "student's head is of kind 'rows', the teacher's of kind 'tokens'"),
        ("masked_lm", "single_label", "student's head is of kind 'masked_lm', the teacher's of kind 'rows'"),
        ("question_answering", "token", "student's head is of kind 'span', the teacher's of kind 'tokens'"),
        ("single_label", "regression", "The student has 3 outputs, the teacher 1, and one of them is a regression"),
        ("regression", "single_label", "The student has 1 outputs, the teacher 3, and one of them is a regression"),
        ("multi_label", "regression", "problem_type is 'multi_label_classification' .*the teacher's 'regression'"),
    ],
)
def test_teachers_of_another_question_are_refused(ours, theirs, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_task(ours), teacher_model=tiny_task(theirs).teacher)


def test_numbers_with_names_are_matched_by_them(make_trainer):
    """Two numbers to predict, which the teacher gives in the other order."""
    task = tiny_task("multi_label")
    number = task.student.config.num_labels
    for model, names in ((task.student, "abcdefgh"[:number]), (task.teacher, "abcdefgh"[:number][::-1])):
        model.config.problem_type, model.config.id2label = "regression", dict(enumerate(names))
    trainer = make_trainer(task)
    batch = task.collate(task.rows[:4])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = task.teacher(**inputs).logits.flip(-1)
    torch.testing.assert_close(trainer._ask_teacher(batch, trainer.losses.teacher_needs, True).logits, expected)


def test_a_stated_problem_type_is_compared(make_trainer):
    task = tiny_task("multi_label")
    task.teacher.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match=r"set the same config\.problem_type"):
        make_trainer(task)


# ---- Tokenizers ----


def test_the_same_tokenizer_passes_in_silence(make_trainer, caplog):
    processors = {"processing_class": make_tokenizer(), "teacher_processing_class": make_tokenizer()}
    trained(tiny_task("masked_lm"), make_trainer, **processors)
    assert warnings_of(caplog, "") == []


DIFFERENT = {
    "another vocabulary": (
        make_tokenizer([*WORDS[:-1], "other"]),
        "different tokenizers: 1 of the student's 37 tokens",
    ),
    "another order": (make_tokenizer(WORDS[::-1]), "different tokenizers: 32 of the student's 37 tokens"),
    "fewer tokens": (make_tokenizer(WORDS[:-2]), "different tokenizers: 2 of the student's 37 tokens"),
    "another casing": (make_tokenizer(lowercase=False), "the same vocabulary, but 'Hello World' becomes"),
}


@pytest.mark.parametrize("name", ["single_label", "masked_lm"])
@pytest.mark.parametrize("case", DIFFERENT)
def test_different_tokenizers_are_refused(case, name, make_trainer):
    theirs, message = DIFFERENT[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_task(name), processing_class=make_tokenizer(), teacher_processing_class=theirs)


@pytest.mark.parametrize("by", ["path", "model"])
@pytest.mark.parametrize("case", [None, "another order", "another casing"])
def test_the_teachers_tokenizer_is_loaded_from_beside_its_weights(case, by, make_trainer, tmp_path, caplog):
    task = tiny_task("single_label")
    task.teacher.save_pretrained(tmp_path / "teacher")
    (DIFFERENT[case][0] if case else make_tokenizer()).save_pretrained(tmp_path / "teacher")
    path = str(tmp_path / "teacher")
    teacher = path if by == "path" else type(task.teacher).from_pretrained(path)
    if case is None:
        make_trainer(task, teacher_model=teacher, processing_class=make_tokenizer())
        assert warnings_of(caplog, "Unchecked") == []
        return
    with pytest.raises(ValueError, match=DIFFERENT[case][1]):
        make_trainer(task, teacher_model=teacher, processing_class=make_tokenizer())


@pytest.mark.parametrize("known", [{}, {"processing_class": make_tokenizer()}])
def test_a_missing_tokenizer_is_told_once(known, make_trainer, caplog):
    caplog.set_level(logging.WARNING)
    trained(tiny_task("masked_lm"), make_trainer, **known)
    assert len(warnings_of(caplog, "Unchecked: whether student and teacher share a tokenizer")) == 1


def test_a_teacher_built_in_code_is_not_looked_up_by_its_class_name(make_trainer, monkeypatch):
    asked = []  # the Hub may have a stranger's repository of this name
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, **kwargs: asked.append(name))
    make_trainer(tiny_task("single_label"), processing_class=make_tokenizer())
    assert asked == []


@pytest.mark.parametrize("name", ["pad_token_id", "sep_token_id", "mask_token_id", "bos_token_id", "eos_token_id"])
def test_without_tokenizers_special_ids_are_compared(name):
    configs = [BertConfig(vocab_size=100, **{name: index}) for index in (0, 3)]
    with pytest.raises(ValueError, match=f"{name} is 0 in the student and 3 in the teacher"):
        shared_vocabulary(*configs, None, None)


def test_without_tokenizers_sizes_that_no_padding_explains_are_refused(make_trainer):
    with pytest.raises(ValueError, match="vocabulary has 30522 entries, the teacher's 50265: more than padding"):
        shared_vocabulary(BertConfig(vocab_size=30522), BertConfig(vocab_size=50265), None, None)


@pytest.mark.parametrize("with_tokenizers", [True, False])
@pytest.mark.parametrize("sizes", [(151936, 152064), (152064, 151936), (151936, 151936)])
def test_vocabularies_that_differ_by_padding_share_the_smaller_one(sizes, with_tokenizers, caplog):
    """Qwen2.5's 0.5B and 7B models have these sizes and one tokenizer."""
    tokenizers = [make_tokenizer(), make_tokenizer()] if with_tokenizers else [None, None]
    shared = shared_vocabulary(*(Qwen2Config(vocab_size=size) for size in sizes), *tokenizers)
    assert shared == (None if sizes[0] == sizes[1] else 151936)
    assert len(warnings_of(caplog, "Unchecked")) == (not with_tokenizers)


@pytest.mark.parametrize("padded", ["student", "teacher"])
@pytest.mark.parametrize("name", ["masked_lm", "causal_lm"])
def test_padding_of_a_vocabulary_changes_nothing(name, padded, make_trainer):
    """Against the same models unpadded; padded rows of the student learn nothing from soft targets."""
    tokenizers = {"processing_class": make_tokenizer(), "teacher_processing_class": make_tokenizer()}
    settings = {"hard_label_weight": 0.0, **tokenizers}  # hard labels do see the student's padding
    plain, task = tiny_task(name), tiny_task(name)
    model = getattr(task, padded)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCABULARY:] = 5.0  # would draw much probability if it took part
    before = {key: value.double() for key, value in copy.deepcopy(task.student.state_dict()).items()}
    weights, expected = trained(task, make_trainer, **settings), trained(plain, make_trainer, **settings)
    for key, value in weights.items():
        used = value[:VOCABULARY] if value.shape[:1] == (VOCABULARY + 3,) else value
        assert (used - expected[key]).norm() <= 1e-10 * expected[key].norm(), key
        assert torch.equal(value[len(used) :], before[key][len(used) :]), key


def test_tokens_that_only_the_teacher_has_do_not_take_part():
    ours, theirs = make_tokenizer(), make_tokenizer([*WORDS, "extra", "more"])
    assert shared_vocabulary(BertConfig(vocab_size=37), BertConfig(vocab_size=40), ours, theirs) == 37
    assert shared_vocabulary(BertConfig(vocab_size=40), BertConfig(vocab_size=40), ours, theirs) == 37


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_ids_beyond_a_vocabulary_are_refused(side):
    sizes = {"student": 40, "teacher": 40, side: 30}
    configs = [BertConfig(vocab_size=size) for size in sizes.values()]
    with pytest.raises(ValueError, match=f"tokenizer uses 37 ids, but the {side}'s vocabulary has only 30"):
        shared_vocabulary(*configs, make_tokenizer(), make_tokenizer())


# ---- Lengths and images ----


def test_a_teacher_that_reads_less_is_refused_unless_inputs_are_cut(make_trainer):
    def with_short_teacher(**kwargs):
        task = tiny_task("single_label")
        config = copy.deepcopy(task.teacher.config)
        config.max_position_embeddings = 16
        return make_trainer(task, teacher_model=type(task.teacher)(config), **kwargs)

    with pytest.raises(
        ValueError, match=r"teacher reads at most 16 tokens, the student up to 32.*model_max_length = 16"
    ):
        with_short_teacher()
    with pytest.raises(ValueError, match="teacher reads at most 16 tokens"):
        with_short_teacher(processing_class=make_tokenizer(model_max_length=17))
    with_short_teacher(processing_class=make_tokenizer(model_max_length=16))


PROCESSOR = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.5], "size": {"height": 8, "width": 8}}


@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.4]}, {"image_std": (0.2,)}, {"size": {"height": 9, "width": 8}}, {"do_normalize": False}],
)
def test_image_processors_that_show_other_pixels_are_refused(change):
    with pytest.raises(ValueError, match=f"image processors differ: {next(iter(change))} is"):
        check_image_processors(SimpleNamespace(**PROCESSOR), SimpleNamespace(**{**PROCESSOR, **change}))


def test_image_processors_that_show_the_same_pixels_pass():
    same = {"image_mean": (0.5,), "size": {"width": 8, "height": 8, "shortest_edge": None}, "resample": 3}
    check_image_processors(SimpleNamespace(**PROCESSOR), SimpleNamespace(**{**PROCESSOR, **same}))
