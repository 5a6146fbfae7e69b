"""Imports point down, as the house is drawn: a room may import only from the rooms below it."""

import ast
from pathlib import Path

import pytest

import hf_distill

PACKAGE = Path(hf_distill.__file__).parent
# Room -> the rooms it may import from. A module is its own room, a folder is one.
MAY_IMPORT = {
    "functional": set(),
    "top_k": {"functional"},
    "unprojected": {"functional", "top_k"},
    "activations": {"unprojected"},
    "mapping": set(),
    "projection": set(),
    "batch": {"activations", "top_k", "unprojected"},
    "batching": {"activations"},
    "random_state": set(),
    "schedules": set(),
    "term_log": set(),
    "heads": {"activations"},
    "attention_twin": set(),
    "recording": {"activations", "attention_twin"},
    "packing": {"activations", "attention_twin", "batching", "heads"},
    "padding": {"activations", "batch", "batching", "heads", "output_head", "packing", "teachers"},
    "similarity": {"functional"},
    "output_head": {"functional", "activations", "heads", "unprojected"},
    "losses": {
        "functional", "activations", "batch", "mapping", "projection", "schedules", "similarity", "top_k",
        "unprojected",
    },
    "teachers": {
        "activations", "alignment", "batch", "batching", "heads", "output_head", "packing", "random_state",
        "recording", "top_k", "unprojected",
    },
    "alignment": {"activations", "unprojected"},
    "class_labels": set(),
    "tasks": {"class_labels", "heads"},
    "token_alignment": {"activations", "unprojected"},
    "transfer": {
        "activations", "alignment", "batch", "functional", "heads", "random_state", "tasks", "teachers", "writing",
    },
    "layer_proposal": {"activations", "heads", "mapping", "similarity", "teachers"},
    "training_args": {"losses", "mapping", "secrets"},
    "wrapped_forward": {"losses"},
    "students": {"mapping", "heads"},
    "secrets": set(),
    "writing": set(),
    "reports": {"functional", "activations", "heads", "losses", "metrics", "random_state", "secrets", "writing"},
    "refusals": {"activations", "heads", "losses", "training_args", "transfer"},
    "pairing": {"activations", "alignment", "heads", "losses", "teachers"},
    "preflight": {
        "activations", "batch", "heads", "losses", "output_head", "padding", "random_state", "recording",
        "refusals", "teachers", "transfer",
    },
    "caching": {"heads", "losses", "output_head", "preflight", "teachers"},
    "fitting": {"activations", "batch", "caching", "preflight", "random_state", "teachers"},
    "lifecycle": {"activations", "losses", "reports", "secrets", "teachers", "wrapped_forward"},
    "counting": {"batch", "heads", "lifecycle", "schedules", "term_log"},
    "trainer": {
        "activations", "batch", "caching", "counting", "fitting", "heads", "losses", "output_head", "packing",
        "padding", "pairing", "preflight", "recording", "refusals", "teachers", "token_alignment",
        "training_args", "transfer", "wrapped_forward",
    },
    "__init__": {
        "layer_proposal", "losses", "mapping", "schedules", "students", "teachers", "trainer", "training_args",
    },
    "recipes": {
        "activations", "alignment", "heads", "losses", "metrics", "reports", "students", "tasks", "teachers",
        "trainer", "training_args", "transfer", "writing",
    },
    "exported": set(),
    "export": {"alignment", "exported", "heads", "writing"},
    "metrics": set(),
    "cli": {
        "class_labels", "export", "exported", "heads", "layer_proposal", "recipes", "reports", "students", "tasks",
        "training_args", "transfer", "writing",
    },
    "testing": {"activations", "batch", "losses", "unprojected"},
}  # fmt: skip
TORCH_ALONE = (
    "functional", "top_k", "unprojected", "activations", "batch", "batching", "mapping", "projection", "schedules",
    "similarity", "term_log", "token_alignment",
)  # fmt: skip


def imports(path):
    """Top-level module names and, for our own, the room; what is only imported for type checkers is no arrow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def files():
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=str)
def test_arrows_point_down(path):
    room = path.parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imports(PACKAGE / path) if name.startswith("hf_distill.")}
    assert ours - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("room", TORCH_ALONE)
def test_the_lowest_rooms_import_torch_alone(room):
    paths = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    outside = {name.split(".")[0] for path in paths for name in imports(path)} - {"hf_distill"}
    standard = {"__future__", "collections", "contextlib", "dataclasses", "math", "typing"}
    assert outside - standard <= {"torch"}


def test_losses_know_no_model_and_no_trainer():
    names = {name for path in (PACKAGE / "losses").glob("*.py") for name in imports(path)}
    assert not {name for name in names if name.startswith("transformers")}


def test_nothing_imports_torchvision():
    assert not [path for path in files() for name in imports(PACKAGE / path) if name.startswith("torchvision")]
