r"""Make a folder of sentences from product reviews, rated positive or not, with whole reviews in one split each.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    tar xzf vaderSentiment-3.3.2.tar.gz
    python make_product_reviews.py \
        vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz product_reviews

`amazonReviewSnippets` of the archive that the movie sentences are from: 3,708 sentences about five products (Hu & Liu,
2004), of which 30 % of the reviews are the test and 10 % validation. The folder is for `datasets.load_from_disk`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from make_further_sentences import rated_lines

NAME = "amazonReviewSnippets"
TEST, VALIDATION = 0.3, 0.4  # up to which share of the reviews


def read_ratings(archive: Path) -> list[tuple[int, float, str]]:
    """Each sentence's review, mean rating from -4 to 4, and text."""
    rows = [line.split("\t") for line in rated_lines(archive, NAME)]
    return [(int(sentence.split("_")[0]), float(rating), text) for sentence, rating, text in rows]


def split_reviews(reviews: set[int]) -> dict[int, str]:
    """The split of each review."""
    shuffled = sorted(reviews)
    random.Random(0).shuffle(shuffled)
    ends = {"test": TEST * len(shuffled), "validation": VALIDATION * len(shuffled), "train": len(shuffled)}
    return {review: next(split for split, end in ends.items() if k < end) for k, review in enumerate(shuffled)}


def product_reviews(archive: Path) -> DatasetDict:
    """The three splits; positive is a rating above 0."""
    ratings = read_ratings(archive)
    parts = split_reviews({review for review, _, _ in ratings})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": [], "test": []}
    for review, rating, text in ratings:
        rows[parts[review]].append({"text": text, "label": int(rating > 0)})
    return DatasetDict({split: Dataset.from_list(some, features) for split, some in rows.items()})


def main() -> None:
    """Read the archive named first, write the folder named second."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    archive, target = map(Path, sys.argv[1:])
    data = product_reviews(archive)
    data.save_to_disk(target)
    print({split: len(part) for split, part in data.items()})


if __name__ == "__main__":
    main()
