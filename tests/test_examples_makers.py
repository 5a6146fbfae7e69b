"""The makers of the examples' larger datasets, on small sources."""

import gzip
import io
import struct
import sys
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

DATA = Path(__file__).parent.parent / "examples" / "data"


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    return import_module


@pytest.fixture
def brown(maker):
    return maker("make_brown_tags")


@pytest.fixture
def fashion(maker):
    return maker("make_fashion_mnist")


@pytest.mark.parametrize(
    ("tag", "simple"),
    [("np$", "np"), ("nn-tl", "nn"), ("do*", "do"), ("ppss+bem", "ppss"), ("--", "--"), ("*-hl", "*-hl")],
)
def test_a_tag_is_cut_at_its_endings(brown, tag, simple):
    assert brown.simple_tag(tag) == simple


def test_a_line_is_a_sentence_and_a_word_may_hold_a_slash(brown):
    text = "\n\n\tThe/at jury's/nn$-tl ./.\n\n\t1/2/cd inches/nns ,/, \n"
    sentences = [[("The", "at"), ("jury's", "nn"), (".", ".")], [("1/2", "cd"), ("inches", "nns"), (",", ",")]]
    assert brown.read_sentences(text) == sentences


def test_lines_of_one_or_two_words_are_left_out(brown):
    assert brown.read_sentences("A/at Heading/nn\n\nIt/pps rains/vbz ./.") == [
        [("It", "pps"), ("rains", "vbz"), (".", ".")]
    ]


def test_no_document_is_on_two_sides(brown):
    names = [f"c{i:03}" for i in range(500)]
    parts = brown.split_documents(names)
    assert {split: len(part) for split, part in parts.items()} == {"test": 50, "validation": 50, "train": 400}
    assert sorted(name for part in parts.values() for name in part) == names
    assert brown.split_documents(names[::-1]) == parts


def test_the_tags_are_written_with_their_names(brown, monkeypatch, tmp_path):
    source = tmp_path / "package"
    source.mkdir()
    (source / "README").write_text("no/nn document/nn")
    for i in range(500):
        (source / f"c{chr(ord('a') + i // 50)}{i % 50:02}").write_text(
            f"Word{i}/nn rains/vbz ./.\n", encoding="latin-1"
        )
    monkeypatch.setattr(sys, "argv", ["", str(source), str(tmp_path / "out")])
    brown.main()
    data = load_from_disk(tmp_path / "out")
    assert {split: len(part) for split, part in data.items()} == {"train": 400, "validation": 50, "test": 50}
    assert data["test"].features["tags"].feature.names == [".", "nn", "vbz"]
    assert {tuple(row["tags"]) for row in data["train"]} == {(1, 2, 0)}
    assert len({row["words"][0] for part in data.values() for row in part}) == 500


def test_a_folder_without_the_corpus_is_refused(brown, tmp_path):
    with pytest.raises(SystemExit, match=r"holds 0 documents .* has 500"):
        brown.brown_tags(tmp_path)


def write_idx(file, values):
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes()))


def test_images_and_classes_come_out_as_they_were(fashion, monkeypatch, tmp_path):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(256, size=(14, 28, 28), dtype=np.uint8), np.arange(14, dtype=np.uint8) % 10
    for split, part in {"train": slice(0, 10), "t10k": slice(10, 14)}.items():
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images[part])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", labels[part])
    data = fashion.fashion_mnist(tmp_path, validation=3)
    data.save_to_disk(tmp_path / "out")
    data = load_from_disk(tmp_path / "out")
    assert {split: len(part) for split, part in data.items()} == {"train": 7, "validation": 3, "test": 4}
    rows = [row for split in ("train", "validation", "test") for row in data[split]]
    assert np.array_equal(np.stack([np.asarray(row["image"]) for row in rows]), images)
    assert [row["label"] for row in rows] == labels.tolist()
    assert {row["image"].mode for row in rows} == {"L"}
    assert data["test"].features["label"].names[9] == "Ankle boot"


def test_another_or_a_missing_file_is_refused(fashion, tmp_path):
    with pytest.raises(SystemExit, match="is missing"):
        fashion.fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01abcd"))
    with pytest.raises(SystemExit, match="no IDX file"):
        fashion.fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "make_brown_tags",
        "make_documentation_topics",
        "make_fashion_mnist",
        "make_further_sentences",
        "make_movie_sentences",
        "make_product_reviews",
    ],
)
def test_without_a_source_and_a_target_the_usage_is_shown(maker, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=rf"python (examples/data/)?{name}\.py"):
        maker(name).main()


def test_a_review_is_in_one_split_with_the_sign_of_its_ratings(maker, monkeypatch, tmp_path):
    products = maker("make_product_reviews")
    rows = [(review, k, (review + k) % 3 - 1) for review in range(1, 101) for k in range(4)]
    text = "".join(f"{review}_{k}\t{rating}\treview {review} says {rating}\n" for review, k, rating in rows)
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "archive"), str(tmp_path / "out")])
    products.main()
    data = load_from_disk(tmp_path / "out")
    reviews = {split: {row["text"].split()[1] for row in part} for split, part in data.items()}
    assert {split: len(some) for split, some in reviews.items()} == {"train": 60, "validation": 10, "test": 30}
    assert len(set().union(*reviews.values())) == 100
    found = sorted((row["text"], row["label"]) for part in data.values() for row in part)
    assert found == sorted((f"review {review} says {rating}", int(rating > 0)) for review, _, rating in rows)


def test_a_further_sentence_is_learned_from_or_held_out(maker, monkeypatch, tmp_path):
    further = maker("make_further_sentences")
    lines = {"amazonReviewSnippets": 3, "nytEditorialSnippets": 4, "tweets": 5}
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        for name, number in lines.items():
            text = "".join(f"{i}_1\t-0.5\t{name} {i} &amp;  so\ton.\n" for i in range(number)) + "9\t1\ttwice\n"
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    brown = tmp_path / "package"
    brown.mkdir()
    for i in range(10):
        (brown / f"ca{i:02}").write_text(f"Word{i}/nn rains/vbz ./.\n")
    monkeypatch.setattr(further, "FROM_BROWN", 7)
    monkeypatch.setattr(further, "HELD_OUT", 6)
    targets = [tmp_path / "learned.txt", tmp_path / "held_out.txt"]
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "archive"), str(brown), *map(str, targets)])
    further.main()
    learned, held_out = (target.read_text().splitlines() for target in targets)
    archive = {f"{name} {i} & so on." for name, number in lines.items() for i in range(number)} | {"twice"}
    assert len(held_out) == 6
    assert len({*learned, *held_out}) == len(learned) + len(held_out) == len(archive) + 7
    assert {text for text in [*learned, *held_out] if "rains" not in text} == archive
    with pytest.raises(SystemExit, match="no documents"):
        further.further_sentences(tmp_path / "archive", tmp_path)


def test_a_paragraph_is_labelled_with_its_folder_and_a_file_is_in_one_split(maker, monkeypatch, tmp_path):
    topics = maker("make_documentation_topics")
    root = tmp_path / "Documentation"
    letters = "abcdefghijklmn"
    for size, folder in enumerate([*letters, "process", "translations"]):
        for file in range(20):
            paragraphs = [
                f"{folder} {file} {i} says in a few more words what it is about, at some length"
                for i in range(size + 1)
            ]
            paragraphs += [
                "=" * 70,
                f"  {paragraphs[0]} indented",
                "Short.",
                "What stands in every file of every folder is read only once",
            ]
            path = root / folder / ("deep" if file % 2 else "") / f"{file}.rst.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("\n\n".join(paragraphs).encode()))
    monkeypatch.setattr(sys, "argv", ["", str(root), str(tmp_path / "out")])
    topics.main()
    data = load_from_disk(tmp_path / "out")
    assert data["test"].features["label"].names == list(letters[2:])  # the largest, without process and translations
    rows = [(split, *row["text"].split()[:3], row["label"]) for split, part in data.items() for row in part]
    assert all(folder == letters[2 + label] for _, folder, _, _, label in rows)
    assert len({row[1:4] for row in rows}) == len(rows) == sum(20 * (3 + i) for i in range(12))
    files = {split: {row[1:3] for row in rows if row[0] == split} for split in data}
    assert {split: len(some) for split, some in files.items()} == {"train": 168, "validation": 24, "test": 48}
    assert len(set.union(*files.values())) == 240
    with pytest.raises(SystemExit, match="has no paragraphs"):
        topics.documentation_topics(tmp_path / "out")
