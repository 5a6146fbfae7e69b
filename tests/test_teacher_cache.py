"""The teacher cache: the same training as with the teacher at hand, whatever happens to the process or the data."""

import datasets
import pytest
import torch
from packaging.version import Version
from parity import different_tensors
from transformers import Trainer, TrainingArguments

from hf_distill import cache_teacher_outputs
from hf_distill.activations import Needs
from hf_distill.teachers import OnlineTeacher
from hf_distill.teachers.cache import TeacherCache
from hf_distill.testing import TASKS, tiny_task

EVERY_TERM = {"hidden_state_weight": 1.0, "attention_weight": 1.0, "teacher_cache_dtype": "float32"}


class Counting(OnlineTeacher):
    """Counts the rows it is asked about."""

    def __init__(self, model):
        self.rows = 0
        super().__init__(model)

    def answer(self, inputs, needs, dtype=None):
        self.rows += len(next(iter(inputs.values())))
        return super().answer(inputs, needs, dtype)


def run(make_trainer, task, **kwargs):
    trainer = make_trainer(task, eval_dataset=task.rows[:10], max_steps=4, **kwargs)
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.mark.parametrize("name", TASKS)
def test_a_cached_run_equals_an_uncached_one(name, make_trainer, tmp_path):
    plain, plain_metrics = run(make_trainer, tiny_task(name), **EVERY_TERM)
    cached, metrics = run(make_trainer, tiny_task(name), teacher_cache_dir=str(tmp_path / "cache"), **EVERY_TERM)
    assert different_tensors(cached.model.state_dict(), plain.model.state_dict()) == []
    assert different_tensors(cached.losses.state_dict(), plain.losses.state_dict()) == []
    losses = {key: value for key, value in plain_metrics.items() if key.endswith("_loss")}
    assert {key: metrics[key] for key in losses} == pytest.approx(losses, rel=1e-5)


def test_states_kept_in_fp16_are_as_exact_as_fp16(make_trainer, tmp_path):
    plain, _ = run(make_trainer, tiny_task("token"), hidden_state_weight=1.0)
    cached, _ = run(
        make_trainer, tiny_task("token"), hidden_state_weight=1.0, teacher_cache_dir=str(tmp_path / "cache")
    )
    assert different_tensors(cached.model.state_dict(), plain.model.state_dict(), 1e-3) == []


def test_the_teacher_is_asked_once_about_every_row(make_trainer, tmp_path):
    task = tiny_task("single_label")
    answered = []
    for seed in range(2):
        teacher = Counting(task.teacher)
        student = tiny_task("single_label", seed=seed).student
        options = {"seed": seed, "teacher_cache_dir": str(tmp_path / "cache"), "num_train_epochs": 2}
        trainer = make_trainer(task, model=student, teacher_model=teacher, eval_dataset=task.rows[:10], **options)
        before = teacher.rows  # the dry run of an empty cache asks, too
        trainer.train(), trainer.evaluate()
        answered.append(teacher.rows - before)
    # Three rows more tell whether padding changes this teacher's answers.
    assert answered == [len(task.rows) + 3, 0]


def test_a_teacher_is_known_under_another_name_too(make_trainer, tmp_path, capsys):
    for name in ("model", "teacher"):
        task = tiny_task("single_label")
        task.teacher.config._name_or_path = name
        run(make_trainer, task, teacher_cache_dir=str(tmp_path / "cache"))
    assert "asked about 0 of 48 rows" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_cache_needs_no_teacher_weights(make_trainer, tmp_path):
    task = tiny_task("token")
    task.teacher.save_pretrained(tmp_path / "teacher")
    options = {"teacher_cache_dir": str(tmp_path / "cache"), **EVERY_TERM}
    first, _ = run(make_trainer, tiny_task("token"), teacher_model=str(tmp_path / "teacher"), **options)
    assert not first.teacher.is_loaded  # freed
    trainer = make_trainer(tiny_task("token"), teacher_model=str(tmp_path / "teacher"), max_steps=4, **options)
    trainer.teacher._loader = None  # cannot be loaded
    trainer.train()
    plain, _ = run(make_trainer, tiny_task("token"), **EVERY_TERM)
    assert different_tensors(trainer.model.state_dict(), plain.model.state_dict()) == []


def test_left_padding_and_columns_of_a_dataset_share_the_cache(make_trainer, tmp_path):
    """Rows are known by their content, not by their padding, order or container."""
    task = tiny_task("token")
    teacher = Counting(task.teacher)
    make_trainer(task, teacher_model=teacher, teacher_cache_dir=str(tmp_path), max_steps=1).train()
    asked = teacher.rows
    rows = datasets.Dataset.from_list(task.rows[::-1]).add_column("unused", ["x"] * len(task.rows))
    trainer = make_trainer(
        task, train_dataset=rows, teacher_model=teacher, teacher_cache_dir=str(tmp_path), max_steps=1
    )
    trainer.train()
    assert teacher.rows == asked


# ---- What must not be used ----


def change_weight(task):
    task.teacher.classifier.weight.data[0, 0] += 1e-3


def change_config(task):
    task.teacher.config.hidden_act = "relu"


def change_rows(task):
    for row in task.rows:
        row["input_ids"] = [1 + token % 30 for token in row["input_ids"]]


def change_collator(task):
    collate = task.collate

    def other(rows):
        batch = collate(rows)
        batch["token_type_ids"] = batch["attention_mask"].clone()
        return batch

    task.collate = other


@pytest.mark.parametrize("change", [change_weight, change_config, change_rows, change_collator])
def test_stale_answers_are_asked_again(change, make_trainer, tmp_path):
    make_trainer(tiny_task("single_label"), teacher_cache_dir=str(tmp_path), max_steps=1).train()
    task = tiny_task("single_label")
    change(task)
    teacher = Counting(task.teacher)
    trainer = make_trainer(task, teacher_model=teacher, teacher_cache_dir=str(tmp_path), max_steps=1)
    trainer.train()
    assert teacher.rows >= len(task.rows)


def test_other_needs_have_a_cache_of_their_own_and_fewer_needs_have_not(make_trainer, tmp_path):
    task = tiny_task("single_label")
    asked = []
    for weights in ({"hidden_state_weight": 1.0}, {}, {"attention_weight": 1.0}):
        teacher = Counting(task.teacher)
        trainer = make_trainer(task, teacher_model=teacher, teacher_cache_dir=str(tmp_path), max_steps=1, **weights)
        before = teacher.rows
        trainer.train()
        asked.append(teacher.rows - before)
    assert asked == [len(task.rows) + 3, 0, len(task.rows) + 3]


def test_new_rows_keep_a_larger_cache_whole(make_trainer, tmp_path):
    """A run that needs less may add rows to the cache of one that needs more, which then finds all it needs."""
    task = tiny_task("single_label")
    needs_more = {"hidden_state_weight": 1.0, "teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    make_trainer(task, train_dataset=task.rows[:20], **needs_more).train()
    make_trainer(task, teacher_cache_dir=str(tmp_path / "cache"), max_steps=1).train()
    teacher = Counting(task.teacher)
    trainer = make_trainer(task, teacher_model=teacher, **needs_more)
    before = teacher.rows
    trainer.train()
    assert teacher.rows == before


def test_another_precision_has_a_cache_of_its_own(make_trainer, tmp_path, capsys):
    task = tiny_task("single_label")
    for dtype in ("float32", "bfloat16"):
        make_trainer(task, teacher_cache_dir=str(tmp_path / "cache"), teacher_dtype=dtype, max_steps=1).train()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert "reduced precision changes the answers by" in capsys.readouterr().out


def test_a_teacher_for_whom_padding_matters_is_asked_about_one_length_at_a_time(make_trainer, tmp_path):
    """Its answers are those for the rows alone, as no batch decides them."""
    task = tiny_task("single_label")
    forward = task.teacher.bert.embeddings.forward
    # Like a convolution that does not look at the mask: the mean over all positions, padding too.
    task.teacher.bert.embeddings.forward = lambda *a, **k: (lambda x: x + x.mean(1, keepdim=True))(forward(*a, **k))
    trainer = make_trainer(task, teacher_cache_dir=str(tmp_path), max_steps=1)
    trainer.train()
    alone = torch.cat([task.teacher(**_inputs(task, [row])).logits for row in task.rows])
    batch = trainer.data_collator(task.rows)
    assert torch.allclose(batch["teacher_logits"], alone, atol=1e-5)


def _inputs(task, rows):
    return {key: value for key, value in task.collate(rows).items() if key != "labels"}


# ---- The parts ----


@pytest.mark.skipif(
    Version(datasets.__version__) < Version("5.1"), reason="older datasets know no binary columns of a fixed size"
)
def test_the_files_open_with_datasets(make_trainer, tmp_path):
    task = tiny_task("single_label")
    make_trainer(task, teacher_cache_dir=str(tmp_path), max_steps=1).train()
    (file,) = tmp_path.rglob("*.arrow")
    rows = datasets.Dataset.from_file(str(file))
    assert len(rows) == len(task.rows)
    assert len(rows[0]["teacher_logits"]) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_on_a_gpu_the_teacher_is_released_and_nothing_changes(name, make_trainer, tmp_path):
    options = {"use_cpu": False, "padding_free": name != "image", **EVERY_TERM}
    plain, _ = run(make_trainer, tiny_task(name), use_cpu=False, padding_free=False, **EVERY_TERM)
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_dtype": "float32"}
    cached, _ = run(make_trainer, tiny_task(name), **options, **cache)
    assert cached.teacher.model.device.type == "cpu"
    assert different_tensors(cached.model.state_dict(), plain.model.state_dict(), 1e-4) == []


@pytest.mark.parametrize("at_hand", [True, False], ids=["teacher at hand", "no teacher"])
@pytest.mark.parametrize("name", ["single_label", "token", "question_answering"])
def test_answers_as_columns_train_like_the_teacher(name, at_hand, make_trainer, tmp_path):
    """Also after a round through a saved dataset, as one that was pushed and loaded."""
    plain, _ = run(make_trainer, tiny_task(name), hidden_state_weight=1.0, layer_mapping={2: 4})
    task = tiny_task(name)
    rows = datasets.Dataset.from_list(task.rows)
    options = {"data_collator": task.collate, "state_dtype": "float32", "progress": False}
    needs = Needs(logits=True, hidden_states=(4,))
    with_columns = cache_teacher_outputs(rows, task.teacher, needs, cache_dir=tmp_path / "cache", **options)
    with_columns.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert loaded.column_names == [*rows.column_names, "teacher_logits", "teacher_hidden_states_4"]
    kwargs = {"train_dataset": loaded, "hidden_state_weight": 1.0, "layer_mapping": {2: 4}, "max_steps": 4}
    trainer = make_trainer(task, **kwargs, **({} if at_hand else {"teacher_model": None}))
    if at_hand:
        trainer.teacher.answer = None  # from here on nobody can ask it
    trainer.train()
    assert different_tensors(trainer.model.state_dict(), plain.model.state_dict()) == []


@pytest.mark.parametrize("kind", ["list", "torch dataset", "stream"])
def test_answers_in_rows_of_any_kind_train_like_the_teacher(kind, make_trainer, tmp_path):
    plain, _ = run(make_trainer, tiny_task("token"), hidden_state_weight=1.0, layer_mapping={2: 4})
    task = tiny_task("token")
    options = {"data_collator": task.collate, "state_dtype": "float32", "progress": False}
    needs = Needs(logits=True, hidden_states=(4,))
    columns = cache_teacher_outputs(
        datasets.Dataset.from_list(task.rows), task.teacher, needs, cache_dir=tmp_path / "cache", **options
    )
    rows = [columns[k] for k in range(len(columns))]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    given = {"list": rows, "torch dataset": Rows(),
             "stream": datasets.IterableDataset.from_generator(lambda: iter(rows))}[kind]  # fmt: skip
    trainer = make_trainer(task, train_dataset=given, hidden_state_weight=1.0, layer_mapping={2: 4}, max_steps=4)
    trainer.teacher.answer = None  # from here on nobody can ask it
    trainer.train()
    if kind != "stream":  # which is read in its own order
        assert different_tensors(trainer.model.state_dict(), plain.model.state_dict()) == []


@pytest.mark.parametrize("when", ["evaluate", "train"])
def test_an_empty_evaluation_set_is_no_mistake(when, make_trainer, tmp_path):
    task = tiny_task("single_label")
    trainer = make_trainer(
        task, teacher_cache_dir=str(tmp_path), eval_dataset=[], max_steps=1,
        **({"eval_strategy": "epoch"} if when == "train" else {}),
    )  # fmt: skip
    assert "eval_loss" not in (trainer.evaluate() if when == "evaluate" else trainer.train().metrics)


def test_a_class_of_ones_own_with_another_forward_has_a_cache_of_its_own(make_trainer, tmp_path):
    task = tiny_task("single_label")
    make_trainer(task, teacher_cache_dir=str(tmp_path), max_steps=1).train()

    class Louder(type(task.teacher)):
        def forward(self, *args, **kwargs):
            answer = super().forward(*args, **kwargs)
            answer.logits = 5 * answer.logits
            return answer

    teacher = Louder(task.teacher.config)
    teacher.load_state_dict(task.teacher.state_dict())
    asked = Counting(teacher.eval())
    trainer = make_trainer(task, teacher_model=asked, teacher_cache_dir=str(tmp_path), max_steps=1)
    trainer.train()
    assert asked.rows >= len(task.rows)
    batch = trainer.data_collator(task.rows[:2])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(batch["teacher_logits"], 5 * task.teacher(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_many_layers_do_not_make_a_name_too_long(tmp_path):
    teacher = OnlineTeacher(tiny_task("single_label").teacher)
    for layers in (4, 120):
        cache = TeacherCache(tmp_path, teacher, "x", Needs(hidden_states=tuple(range(layers))), teacher.head)
        assert len(cache.folder.name) < 255
        cache.write_manifest()


def test_a_teacher_that_was_evaluated_is_still_known(make_args):
    """Its head notes down in the config of which kind the labels were."""
    task = tiny_task("single_label")
    before = OnlineTeacher(task.teacher).fingerprint()
    Trainer(task.teacher, make_args(cls=TrainingArguments), task.collate).evaluate(task.rows)
    assert task.teacher.config.problem_type == "single_label_classification"
    assert OnlineTeacher(task.teacher).fingerprint() == before
