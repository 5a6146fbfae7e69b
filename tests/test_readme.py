"""The README's Python blocks run, one after the other, in a folder where its names on the Hub are small folders."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_transfer_set import bert
from test_vocabulary import CORPUS, original

import hf_distill
from hf_distill import recipes

README = Path(__file__).parents[1] / "README.md"
TEACHER, DATA = Path("textattack/bert-base-uncased-SST-2"), Path("stanfordnlp/sst2")
SHORT = {"vocabulary_size": 120, "augmented_rows": 8, "training_rows": 64, "arguments": {"use_cpu": True}}


@pytest.mark.skipif(not README.is_file(), reason="only in a checkout")
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert(hidden_size=64, intermediate_size=128, num_hidden_layers=6).save_pretrained(TEACHER)
    original("wordpiece").save_pretrained(TEACHER)
    DATA.mkdir(parents=True)
    for split, texts in (("train", CORPUS[:40]), ("validation", CORPUS[40:60])):
        rows = "".join(f'"{text}",{k % 2}\n' for k, text in enumerate(texts))
        (DATA / f"{split}.csv").write_text(f"sentence,label\n{rows}", encoding="utf-8")
    monkeypatch.setattr(recipes, "compress", partial(recipes.compress, **SHORT))
    trim = hf_distill.trim_vocabulary
    monkeypatch.setattr(hf_distill, "trim_vocabulary", lambda tokenizer, texts, size: trim(tokenizer, texts, 120))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 7
    names = {}
    for block in blocks:
        if "export_student" not in block or find_spec("onnxruntime"):
            exec(compile(block, str(README), "exec"), names)
        if "trainer.save_model()" in block:
            assert Path("out/model.safetensors").is_file()
    assert names["tiny"].num_parameters() < names["teacher"].num_parameters() / 9
    names["trainer"].train()  # with the loss of one's own
