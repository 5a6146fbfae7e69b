r"""Make a dataset of Fashion-MNIST from its four files, as Debian ships them.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python make_fashion_mnist.py unpacked/usr/share/datasets/fashion-mnist fashion_mnist

writes a folder for `datasets.load_from_disk`, with an `image` (28 x 28, grey) and a `label` in each row. The test
rows are the official ones; the last 5,000 official training rows are validation. A model with
`num_channels=1, image_size=28` reads them through a processor of one channel, which needs Pillow and no torchvision:

    ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5], do_resize=False)
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
VALIDATION = 5000


def read_idx(file: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, 8 for bytes, the number of axes, their sizes, the bytes.

    Raises:
        SystemExit: If it is another file.
    """
    try:
        raw = gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise SystemExit(f"{file} is missing. Name the folder with the four files of Fashion-MNIST.") from None
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{file} starts with {raw[:4].hex()}, which is no IDX file of bytes (000008..).")
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def to_dataset(images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Rows of an image and a class. Shape: (N, height, width), (N,)."""
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    return Dataset.from_dict({"image": list(images), "label": labels.astype(np.int64)}, features)


def fashion_mnist(folder: Path, validation: int = VALIDATION) -> DatasetDict:
    """The three splits."""
    read = {
        split: [read_idx(folder / f"{split}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")]
        for split in ("train", "t10k")
    }
    (images, labels), test = read["train"], read["t10k"]
    return DatasetDict({
        "train": to_dataset(images[:-validation], labels[:-validation]),
        "validation": to_dataset(images[-validation:], labels[-validation:]),
        "test": to_dataset(*test),
    })  # fmt: skip


def main() -> None:
    """Read the folder named first, write the one named second."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    data = fashion_mnist(source)
    data.save_to_disk(target)
    print({split: len(part) for split, part in data.items()})


if __name__ == "__main__":
    main()
