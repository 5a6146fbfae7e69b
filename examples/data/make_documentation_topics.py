r"""Make a dataset of topics from the documentation of Linux, as Debian ships it.

    apt-get download linux-doc-6.1 && dpkg-deb -x linux-doc-6.1_*.deb unpacked
    python make_documentation_topics.py unpacked/usr/share/doc/linux-doc-6.1/Documentation topics

writes a folder for `datasets.load_from_disk`, with a paragraph as `text` and the folder it stands in as `label`: the
twelve largest, without `process`. No file is on two sides, no paragraph is there twice. The measured rows are
of 6.1.176-1; later packages differ by a few paragraphs.
"""

from __future__ import annotations

import gzip
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

CLASSES, AMONG = 12, 13  # the topics, of the largest folders
LEFT_OUT = ("process", "translations")
SPLITS = {"test": (0, 1), "validation": (2,), "train": (3, 4, 5, 6, 7, 8, 9)}  # of ten files each
ROWS = {"test": 1500, "validation": 1500, "train": 5000}
FROM_A_FILE = 40  # paragraphs at most
SHORTEST, LONGEST, SPACES = 60, 400, 8  # characters, and the fewest spaces
MARKUP = (" ", "\t", "..", "|", "+", "=")  # what code, directives, tables and headings start with


def read_paragraphs(raw: bytes) -> Iterator[str]:
    """The running text of a document, a paragraph each, on one line."""
    for paragraph in re.split(r"\n\s*\n", raw.decode("utf-8", "replace")):
        text = " ".join(paragraph.split())
        if paragraph.startswith(MARKUP) or "::" in text:
            continue
        if SHORTEST <= len(text) <= LONGEST and text.count(" ") >= SPACES:
            yield text


def read_documents(root: Path) -> dict[tuple[str, str], list[str]]:
    """The paragraphs of each file, by its topic and its path; one that stands in several is the first's.

    Raises:
        SystemExit: If there are none.
    """
    documents: dict[tuple[str, str], list[str]] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.rst*")):
        inside = path.relative_to(root).parts
        if "_sources" in inside or "translations" in inside or len(inside) < 2:
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = [text for text in dict.fromkeys(read_paragraphs(raw)) if text not in seen]
        seen.update(found)
        if found:
            documents[inside[0], str(Path(*inside))] = found
    if not documents:
        raise SystemExit(
            f"{root} has no paragraphs in files like core-api/list.rst.gz. Name the Documentation folder."
        )
    return documents


def choose_topics(documents: dict[tuple[str, str], list[str]]) -> list[str]:
    """The folders with the most paragraphs, in alphabetical order."""
    sizes: dict[str, int] = defaultdict(int)
    for (topic, _), texts in documents.items():
        sizes[topic] += len(texts)
    largest = sorted(sizes, key=lambda topic: -sizes[topic])[:AMONG]
    return sorted(topic for topic in largest if topic not in LEFT_OUT)[:CLASSES]


def documentation_topics(root: Path) -> DatasetDict:
    """The three splits."""
    documents = read_documents(root)
    topics = choose_topics(documents)
    names = sorted(name for name in documents if name[0] in topics)
    random.Random(0).shuffle(names)
    features = Features({"text": Value("string"), "label": ClassLabel(names=topics)})
    data = DatasetDict()
    for split in ("train", "validation", "test"):
        mine = [name for i, name in enumerate(names) if i % 10 in SPLITS[split]]
        rows = [{"text": text, "label": name[0]} for name in mine for text in documents[name][:FROM_A_FILE]]
        random.Random(1).shuffle(rows)
        data[split] = Dataset.from_list(rows[: ROWS[split]], features=features)
    return data


def main() -> None:
    """Read the folder named first, write the one named second."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    data = documentation_topics(source)
    data.save_to_disk(target)
    print({split: len(part) for split, part in data.items()})


if __name__ == "__main__":
    main()
