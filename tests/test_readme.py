"""The README's Python blocks run, one after the other, once their names are filled in."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_transfer_set import bert, labelled
from test_vocabulary import CORPUS, original

from hf_distill import recipes
from hf_distill.testing import tiny_task

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="only in a checkout")
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = tiny_task("single_label")
    task.student.save_pretrained("small-model")
    task.teacher.save_pretrained("path-or-hub-name")
    train = task.rows[:8]
    names = {
        "train": train,
        "dev": task.rows[8:16],
        "teacher": task.teacher,
        "tokenizer": None,
        "accuracy": lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 7
    shipping = [block for block in blocks if "compress(" in block or "export_student(" in block]
    ship(shipping, monkeypatch)
    for row in task.rows:  # of one length, so that the collator that no tokenizer means can stack them
        row.update(input_ids=(row["input_ids"] * 4)[:8], attention_mask=[1] * 8)
    for block in blocks:
        if block in shipping:
            continue
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    names["trainer"].train()


def ship(blocks, monkeypatch):
    """The blocks that start from raw rows: a small teacher, and the recipe in short."""
    teacher = bert(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    names = {"teacher": teacher, "tokenizer": original("wordpiece"), "reviews": labelled({"text": CORPUS[:40]})}
    short = {"vocabulary_size": 120, "augmented_rows": 8, "training_rows": 64, "arguments": {"use_cpu": True}}
    monkeypatch.setattr(recipes, "compress", partial(recipes.compress, **short))
    for block in blocks:
        if "export_student" not in block or find_spec("onnxruntime"):
            exec(compile(block, str(README), "exec"), names)
    assert Path("student/model.safetensors").is_file()
