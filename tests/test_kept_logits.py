"""What a teacher cache keeps of a language model's logits: last hidden states, or the likeliest classes."""

import datasets
import pytest
import torch
from packaging.version import Version
from parity import different_tensors, record_gradients
from test_teacher_cache import Counting

from hf_distill import cache_teacher_outputs
from hf_distill.losses import DISTLoss, LogitMSELoss, SoftTargetLoss
from hf_distill.teachers.kept_logits import KINDS
from hf_distill.testing import VOCABULARY, tiny_task
from hf_distill.training_args import CACHED_LOGITS

LANGUAGE_MODELS = ["causal_lm", "masked_lm"]


def one_step(make_trainer, task, **kwargs):
    """A trainer after a step and an evaluation, the step's gradients, and the losses; caches are filled in fp32 on
    machines with bf16 too.
    """
    kwargs = {"teacher_dtype": "float32", **kwargs}
    trainer = make_trainer(task, max_steps=1, logging_steps=1, logging_strategy="steps", **kwargs)
    gradients = record_gradients(trainer)
    trainer.train()
    metrics = trainer.evaluate(task.rows[:5])
    losses = {key: value for key, value in metrics.items() if key.endswith("_loss")}
    return trainer, gradients[0], losses | {"train": trainer.state.log_history[0]["loss"]}


def columns_on_disk(folder):
    if Version(datasets.__version__) < Version("5.1"):
        pytest.skip("older datasets know no binary columns of a fixed size")
    (file,) = folder.rglob("*.arrow")
    return datasets.Dataset.from_file(str(file))


def test_the_arguments_know_every_way():
    assert CACHED_LOGITS == KINDS


class TestLastHiddenState:
    @pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float16", 2e-3)])
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    def test_gradients_and_losses_are_those_of_the_teacher_at_hand(self, name, dtype, error, make_trainer, tmp_path):
        cache = {"teacher_cache_dir": str(tmp_path), "teacher_cache_dtype": dtype, "teacher_dtype": "float32"}
        _, plain, plain_losses = one_step(make_trainer, tiny_task(name))
        trainer, ours, losses = one_step(make_trainer, tiny_task(name), **cache)
        assert trainer.removable_heads.student is not None
        assert different_tensors(ours, plain, error) == []
        assert losses == pytest.approx(plain_losses, rel=error)
        (folder,) = (path.parent for path in tmp_path.rglob("*.arrow"))
        assert folder.name == f"logits_by_state.{dtype}"  # what "auto" has chosen

    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    def test_supervised_positions_alone_are_kept(self, name, make_trainer, tmp_path):
        task = tiny_task(name)
        trainer = make_trainer(task, max_steps=1, teacher_cache_dir=str(tmp_path))
        trainer.train()
        kept = columns_on_disk(tmp_path)
        shapes = [tuple(shape) for shape in kept["teacher_last_hidden_state_shape"]]
        skipped = 1 if name == "causal_lm" else 0  # nothing answers for the first token
        expected = [sum(label != -100 for label in row["labels"][skipped:]) for row in task.rows]
        assert sorted(shapes) == sorted((count, task.teacher.config.hidden_size) for count in expected)

    def test_soft_targets_everywhere_keep_every_position(self, make_trainer, tmp_path):
        options = {"soft_target_positions": "all", "teacher_cache_dtype": "float32"}
        _, plain, _ = one_step(make_trainer, tiny_task("masked_lm"), **options)
        for _ in range(2):  # beside a cache of the labelled positions
            _, ours, _ = one_step(make_trainer, tiny_task("masked_lm"), teacher_cache_dir=str(tmp_path), **options)
            assert different_tensors(ours, plain) == []
            make_trainer(tiny_task("masked_lm"), teacher_cache_dir=str(tmp_path), max_steps=1).train()

    def test_other_labels_are_asked_about_again(self, make_trainer, tmp_path):
        task = tiny_task("causal_lm")
        make_trainer(task, teacher_cache_dir=str(tmp_path), max_steps=1).train()
        for row in task.rows:
            row["labels"] = row["input_ids"]
        teacher = Counting(task.teacher)
        trainer = make_trainer(task, teacher_model=teacher, teacher_cache_dir=str(tmp_path), max_steps=1)
        trainer.train()
        assert teacher.rows >= sum(-100 in row["labels"] for row in tiny_task("causal_lm").rows)

    def test_the_head_is_part_of_the_size_that_is_said(self, make_trainer, tmp_path, capsys):
        task = tiny_task("causal_lm")
        task.teacher.resize_token_embeddings(VOCABULARY + 500)
        make_trainer(task, teacher_cache_dir=str(tmp_path), max_steps=1, processing_class=None).train()
        size = sum(path.stat().st_size for pattern in ("*.arrow", "*.safetensors") for path in tmp_path.rglob(pattern))
        assert f"{size / 1e6:.1f} MB in" in capsys.readouterr().out

    def test_a_full_cache_needs_the_head_alone(self, make_trainer, tmp_path):
        tiny_task("causal_lm").teacher.save_pretrained(tmp_path / "teacher")
        options = {"teacher_model": str(tmp_path / "teacher"), "teacher_cache_dir": str(tmp_path / "cache")}
        _, first, losses = one_step(make_trainer, tiny_task("causal_lm"), **options)
        trainer = make_trainer(tiny_task("causal_lm"), **options)
        trainer.teacher._loader = None  # cannot be loaded
        assert trainer.cache_keeper.output_head.linear.weight.shape == (VOCABULARY, 24)
        options["teacher_model"] = trainer.teacher
        _, again, losses_again = one_step(make_trainer, tiny_task("causal_lm"), **options)
        assert different_tensors(again, first) == []
        assert losses_again == pytest.approx(losses)

    def test_a_loss_that_reads_all_logits_gets_them(self, make_trainer, tmp_path):
        options = {"losses": {"soft": SoftTargetLoss(), "mse": LogitMSELoss(), "dist": DISTLoss()}}
        _, plain, _ = one_step(make_trainer, tiny_task("causal_lm"), **options)
        _, ours, _ = one_step(
            make_trainer, tiny_task("causal_lm"), teacher_cache_dir=str(tmp_path), teacher_cache_dtype="float32",
            **options,
        )  # fmt: skip
        assert different_tensors(ours, plain) == []

    def test_vocabularies_that_differ_in_padding(self, make_trainer, tmp_path):
        def task():
            made = tiny_task("causal_lm")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made.teacher.resize_token_embeddings(VOCABULARY + 3)
            return made

        _, plain, _ = one_step(make_trainer, task())
        for kind, k in (("hidden_state", 1), ("top_k", VOCABULARY)):
            options = {"teacher_cache_logits": kind, "teacher_cache_top_k": k, "teacher_cache_dtype": "float32"}
            _, ours, _ = one_step(make_trainer, task(), teacher_cache_dir=str(tmp_path), **options)
            assert different_tensors(ours, plain) == []

    def test_a_head_that_cannot_be_taken_off(self, make_trainer, tmp_path):
        def task():
            made = tiny_task("causal_lm")
            made.teacher.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
            return made

        with pytest.raises(ValueError, match=r'cannot be taken off: .* Set teacher_cache_logits="top_k" or "full"'):
            make_trainer(task(), teacher_cache_dir=str(tmp_path), teacher_cache_logits="hidden_state")
        _, plain, _ = one_step(make_trainer, task())
        _, ours, _ = one_step(make_trainer, task(), teacher_cache_dir=str(tmp_path))
        assert different_tensors(ours, plain) == []
        assert "teacher_logits" in columns_on_disk(tmp_path).column_names

    def test_heads_that_are_no_vocabulary_are_refused(self, make_trainer, tmp_path):
        with pytest.raises(ValueError, match="Only the logits of a language model are kept as 'top_k'"):
            make_trainer(tiny_task("token"), teacher_cache_dir=str(tmp_path), teacher_cache_logits="top_k")


class TestTopK:
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    def test_a_cached_run_of_all_classes_is_the_run_with_the_teacher_at_hand(self, name, make_trainer, tmp_path):
        _, plain, plain_losses = one_step(make_trainer, tiny_task(name))
        options = {
            "teacher_cache_logits": "top_k",
            "teacher_cache_top_k": VOCABULARY,
            "teacher_cache_dtype": "float32",
        }
        for _ in range(2):
            _, ours, losses = one_step(make_trainer, tiny_task(name), teacher_cache_dir=str(tmp_path), **options)
            assert different_tensors(ours, plain, 1e-4) == []
            assert losses == pytest.approx(plain_losses, rel=1e-4)

    def test_another_k_has_a_cache_of_its_own(self, make_trainer, tmp_path):
        task, asked = tiny_task("causal_lm"), []
        for k in (3, 5, 3):
            teacher = Counting(task.teacher)
            trainer = make_trainer(
                task, teacher_model=teacher, teacher_cache_dir=str(tmp_path), teacher_cache_logits="top_k",
                teacher_cache_top_k=k, teacher_dtype="float32", max_steps=1,
            )  # fmt: skip
            before = teacher.rows
            trainer.train()
            asked.append(teacher.rows - before)
        assert asked == [len(task.rows) + 3, len(task.rows) + 3, 0]

    def test_bytes_on_disk_are_said(self, make_trainer, tmp_path, capsys):
        task = tiny_task("causal_lm")
        for row in task.rows:
            row["labels"] = row["input_ids"]
        options = {"teacher_cache_logits": "top_k", "teacher_cache_top_k": 3, "max_steps": 1}
        make_trainer(task, teacher_cache_dir=str(tmp_path), **options).train()
        tokens = sum(len(row["input_ids"]) for row in task.rows)
        kept = (tokens - len(task.rows)) * (4 * 2 + 3 * 4)  # four numbers of 2 bytes, three indices of 4
        assert f"({kept / tokens:,.0f} bytes a token)" in capsys.readouterr().out

    def test_a_loss_that_reads_all_logits_is_refused(self, make_trainer, tmp_path):
        options = {"teacher_cache_dir": str(tmp_path), "teacher_cache_logits": "top_k"}
        losses = {"soft": SoftTargetLoss(standardize=True)}
        with pytest.raises(ValueError, match=r"'soft' \(SoftTargetLoss\) reads all of the teacher's logits"):
            make_trainer(tiny_task("causal_lm"), losses=losses, **options)


@pytest.mark.parametrize("kind", ["hidden_state", "top_k"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_answers_as_columns_train_like_the_teacher(name, kind, make_trainer, tmp_path):
    _, plain, _ = one_step(make_trainer, tiny_task(name))
    task = tiny_task(name)
    options = {"data_collator": task.collate, "state_dtype": "float32", "progress": False}
    rows = cache_teacher_outputs(
        datasets.Dataset.from_list(task.rows), task.teacher, cache_dir=tmp_path, logits=kind, top_k=VOCABULARY,
        **options,
    )  # fmt: skip
    kwargs = {"train_dataset": rows}
    if kind == "top_k":
        kwargs["teacher_model"] = None
    task.rows = list(rows)
    _, ours, _ = one_step(make_trainer, task, **kwargs)
    assert different_tensors(ours, plain, 1e-4) == []


def test_columns_of_hidden_states_need_the_head(make_trainer, tmp_path):
    task = tiny_task("causal_lm")
    rows = cache_teacher_outputs(
        datasets.Dataset.from_list(task.rows), task.teacher, cache_dir=tmp_path, logits="hidden_state",
        data_collator=task.collate, progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs the teacher's output head"):
        make_trainer(task, train_dataset=rows, teacher_model=None)


def test_answers_for_other_labels_are_refused(make_trainer, tmp_path):
    task = tiny_task("masked_lm")
    rows = cache_teacher_outputs(
        datasets.Dataset.from_list(task.rows), task.teacher, cache_dir=tmp_path, logits="hidden_state",
        data_collator=task.collate, progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"describes \d+ positions, but \d+ are supervised"):
        make_trainer(task, train_dataset=rows, soft_target_positions="all")
