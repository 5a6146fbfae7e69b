"""What the teacher cache refuses before the first step, since it would be wrong or lost."""

import datasets
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_distill import cache_teacher_outputs
from hf_distill.activations import Needs
from hf_distill.teachers import OnlineTeacher
from hf_distill.teachers.cache import TeacherCache
from hf_distill.testing import tiny_task


def test_padding_that_nothing_tells_is_refused_before_the_teacher_is_asked(make_trainer, tmp_path, capsys):
    task = tiny_task("single_label")
    rows = [{key: value for key, value in row.items() if key != "attention_mask"} for row in task.rows]

    def collate(some):
        return {key: value for key, value in task.collate(some).items() if key != "attention_mask"}

    trainer = make_trainer(task, train_dataset=rows, data_collator=collate, teacher_cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no attention_mask says where"):
        trainer.train()
    assert "Asking the teacher" not in capsys.readouterr().err


def test_dynamic_masking_is_refused(make_trainer, tmp_path):
    from test_teachers import _words

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]", mask_token="w2")
    task = tiny_task("masked_lm")
    rows = [{"input_ids": row["input_ids"]} for row in task.rows]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = make_trainer(task, train_dataset=rows, data_collator=collator, teacher_cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="different each time they are read"):
        trainer.train()


def test_augmentation_that_begins_later_is_refused(make_trainer, tmp_path):
    task = tiny_task("image")

    class Later(torch.utils.data.Dataset):
        epoch = 0

        def __len__(self):
            return len(task.rows)

        def __getitem__(self, i):
            return {**task.rows[i], "pixel_values": task.rows[i]["pixel_values"] + self.epoch}

    rows = Later()
    trainer = make_trainer(task, train_dataset=rows, teacher_cache_dir=str(tmp_path), max_steps=1)
    trainer.train()
    rows.epoch = 1
    with pytest.raises(ValueError, match="16 of 16 rows of a batch are not what the teacher was asked about"):
        trainer.train()


def test_a_stream_is_refused(make_trainer, tmp_path):
    task = tiny_task("single_label")
    rows = datasets.Dataset.from_list(task.rows).to_iterable_dataset()
    trainer = make_trainer(task, train_dataset=rows, teacher_cache_dir=str(tmp_path), max_steps=1)
    with pytest.raises(ValueError, match="needs a dataset with a length"):
        trainer.train()


def test_a_teacher_of_ones_own_needs_a_fingerprint(make_trainer, tmp_path):
    class Own:
        config, name, input_names = None, "own", frozenset({"input_ids"})

        def __call__(self, inputs, needs):
            raise AssertionError

    with pytest.raises(ValueError, match="has no `fingerprint`"):
        make_trainer(tiny_task("single_label"), teacher_model=Own(), teacher_cache_dir=str(tmp_path))


def test_answers_beyond_fp16_are_refused(make_trainer, tmp_path):
    task = tiny_task("single_label")
    task.teacher.bert.embeddings.LayerNorm.weight.data *= 1e6
    options = {"hidden_state_weight": 1.0, "layer_mapping": {0: 0}, "teacher_cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match='teacher_cache_dtype="float32"'):
        make_trainer(task, max_steps=1, **options).train()


def test_a_full_disk_is_told_before_it_is_full(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.teachers.fill.FLUSH_SECONDS", 0.0)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("hf_distill.teachers.fill.shutil.disk_usage", lambda path: usage)
    trainer = make_trainer(tiny_task("single_label"), teacher_cache_dir=str(tmp_path), teacher_batch_size=4)
    with pytest.raises(ValueError, match="GB free"):
        trainer.train()


def test_a_layer_that_no_column_holds_needs_a_teacher(make_trainer, tmp_path):
    task = tiny_task("single_label")
    needs = Needs(logits=True, hidden_states=(4,))
    rows = cache_teacher_outputs(
        datasets.Dataset.from_list(task.rows), task.teacher, needs, data_collator=task.collate, cache_dir=tmp_path,
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="names the teacher's layer 2, which no column of the data holds"):
        make_trainer(task, train_dataset=rows, teacher_model=None, hidden_state_weight=1.0, layer_mapping={1: 2, 2: 4})


def test_needs_without_indices_are_refused(tmp_path):
    teacher = OnlineTeacher(tiny_task("single_label").teacher)
    with pytest.raises(ValueError, match="must name their indices"):
        TeacherCache(tmp_path, teacher, "x", Needs(hidden_states=True), teacher.head)
