"""The parts of the teacher cache: what identifies a row, and the files that its answers are in."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_distill.teachers.keys import content_keys
from hf_distill.teachers.store import AnswerStore
from hf_distill.testing import tiny_task


def model_inputs(task, rows):
    return {key: value for key, value in task.collate(rows).items() if key != "labels"}


def test_keys_tell_content_from_padding():
    task = tiny_task("single_label", rows=64)
    names = {"input_ids", "attention_mask"}
    keys = content_keys(task.collate(task.rows), names)
    alone = np.concatenate([content_keys(task.collate([row]), names) for row in task.rows])
    assert (keys == alone).all()
    left = {key: nn.functional.pad(value, (7, 0)) for key, value in model_inputs(task, task.rows).items()}
    assert (content_keys(left, names) == keys).all()
    assert len(np.unique(keys, axis=0)) == len({tuple(row["input_ids"]) for row in task.rows})


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("bit", [0, 1, 15, 31])
def test_keys_notice_every_single_change(position, bit):
    inputs = {"input_ids": torch.arange(5)[None], "token_type_ids": torch.zeros(1, 5, dtype=torch.long)}
    before = content_keys(inputs, inputs)
    for name in inputs:
        changed = {key: value.clone() for key, value in inputs.items()}
        changed[name][0, position] ^= 1 << bit
        assert (content_keys(changed, inputs) != before).all()


def test_keys_notice_order_names_and_the_smallest_change_of_a_float():
    ids = torch.tensor([[1, 2, 3]])
    assert (
        content_keys({"input_ids": ids}, {"input_ids"}) != content_keys({"input_ids": ids.flip(1)}, {"input_ids"})
    ).all()
    pixels = torch.randn(1, 3, 4, 4)
    nudged = torch.nextafter(pixels, torch.tensor(9.0))
    keys = [content_keys({"pixel_values": value}, {"pixel_values"}) for value in (pixels, nudged, pixels.clone())]
    assert (keys[0] != keys[1]).all()
    assert (keys[0] == keys[2]).all()


def test_a_store_gives_back_what_was_written(tmp_path):
    store = AnswerStore(tmp_path, {"teacher_logits": "float32", "teacher_hidden_states_1": "float16"})
    rows = [torch.randn(n, 3) for n in (2, 5, 0)]
    states = [torch.randn(n, 4).half() for n in (2, 5, 0)]
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2)
    store.write(keys, {"teacher_logits": rows, "teacher_hidden_states_1": states})
    opened = AnswerStore(tmp_path, store.columns)
    where = opened.find(keys[::-1])
    assert all(map(torch.equal, opened.read(where, "teacher_logits"), rows[::-1]))
    assert all(map(torch.equal, opened.read(where, "teacher_hidden_states_1"), states[::-1]))
    assert opened.find(np.array([[0, 2]], np.uint64)).tolist() == [-1]  # half a key is no key


def test_half_written_and_foreign_files_are_never_read(tmp_path):
    store = AnswerStore(tmp_path, {"teacher_logits": "float32"})
    store.write(np.zeros((1, 2), np.uint64), {"teacher_logits": [torch.ones(3)]})
    (whole,) = tmp_path.glob("*.arrow")
    half = whole.read_bytes()[: whole.stat().st_size // 2]
    (tmp_path / "x.arrow.unfinished").write_bytes(half)
    assert len(AnswerStore(tmp_path, store.columns)) == 1
    (tmp_path / "x.arrow").write_bytes(half)  # only a broken disk does this
    with pytest.raises(ValueError, match="Delete it"):
        AnswerStore(tmp_path, store.columns)
