"""Importing the package brings in nothing that is not needed for training."""

import json
import subprocess
import sys

import pytest

EXTRAS = {"onnx", "onnxruntime", "onnxscript", "matplotlib", "optuna", "sklearn", "scipy", "evaluate", "peft"}
CODE = """
import json, sys
from transformers import Trainer
before = set(sys.modules)
import hf_distill
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def brought():
    """The modules that `import hf_distill` adds to those of `from transformers import Trainer`."""
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    return set(json.loads(printed.splitlines()[-1]))


def test_no_extra_is_imported(brought):
    assert "hf_distill.trainer" in brought
    assert not {name.split(".")[0] for name in brought} & EXTRAS


def test_what_training_does_not_need_waits_until_it_is_asked_for(brought):
    assert not brought & {"hf_distill.export", "hf_distill.exported", "hf_distill.testing"}
