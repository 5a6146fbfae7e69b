"""Images as both models see them, whole and in several views."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset

from hf_distill.tasks import Task

KEPT_BYTES = 4 << 30  # of images that stay in memory once they are processed: a small student waits for them
KEPT_SHARE = 8  # and at most this part of the memory that is free


class ImageRows(torch.utils.data.Dataset):
    """Images through their processor: every row as it is, then each again in other views.

    A view is the image shifted by up to an eighth of its sides (and mirrored half of the time, if `mirror`); every
    other view is then mixed with a second image in a random share. The teacher judges what it sees, so no label has to
    fit (function matching, Beyer et al., 2022). A view is the same each time it is read. Processed images stay
    in memory, up to an eighth of what is free there and 4 GB, which the workers of a data loader share.

    Args:
        task: Where the images are.
        dataset: The rows.
        processing_class: Their image processor; `None` if the column holds `pixel_values` already.
        views: How often each row is there.
        mirror: Whether left and right may be exchanged.
        seed: The same seed gives the same views.

    Shape:
        `pixel_values`: (C, height, width).
    """

    def __init__(
        self, task: Task, dataset: Dataset, processing_class: Any, views: int = 1, mirror: bool = True, seed: int = 0
    ) -> None:
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}.")
        # Without a transform of the user's own, which would stand between image and processor.
        self.task, self.dataset, self.processing_class = task, dataset.with_format(None), processing_class
        self.views, self.mirror, self.seed = views, mirror, seed
        self.labels = task.labels(dataset) if views == 1 else None
        self._kept: dict[int, np.ndarray] = {}
        self._room: float | None = None  # known once a process reads

    def __len__(self) -> int:
        return self.views * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} images, got the index {index}.")
        view, row = divmod(index, len(self.dataset))
        pixels = self._pixels(row)
        if view:
            draw = np.random.default_rng([self.seed, view, row])
            pixels = moved(pixels, draw, self.mirror)
            if view % 2 == 0:
                share = np.float32(draw.uniform())
                other = moved(self._pixels(int(draw.integers(len(self.dataset)))), draw, self.mirror)
                pixels = share * pixels + (1 - share) * other if other.shape == pixels.shape else pixels
        labels = {} if self.labels is None else {"labels": self.labels[row]}
        return {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels)), **labels}

    def _pixels(self, row: int) -> np.ndarray:
        kept = self._kept.get(row)
        if self._room is None:
            self._room = room_in_memory()
        if kept is None:
            kept = self._processed(row)
            if kept.nbytes <= self._room:
                self._kept[row] = kept
                self._room -= kept.nbytes
        return kept

    def _processed(self, row: int) -> np.ndarray:
        image = self.dataset[row][self.task.inputs[0]]
        if image is None or isinstance(image, dict):
            raise ValueError(
                f"Row {row} of {self.task.inputs[0]!r} holds no decoded image, got {type(image).__name__}. Leave such "
                "rows out, or cast_column(..., datasets.Image())."
            )
        if self.processing_class is None or self.task.inputs[0] == "pixel_values":
            return np.asarray(image, np.float32)
        channels = len(getattr(self.processing_class, "image_mean", None) or "RGB")
        if isinstance(image, list):
            image = _of_numbers(image, channels)
        else:
            mode = {1: "L", 3: "RGB"}.get(channels, image.mode)
            image = image if image.mode == mode else image.convert(mode)
        return np.asarray(self.processing_class(image, return_tensors="np")["pixel_values"][0], np.float32)


def _of_numbers(image: list[Any], channels: int) -> np.ndarray:
    """An image that is a list of lists. Shape: as it is, or of a grey one (channels, height, width)."""
    pixels = np.asarray(image)
    if pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    return np.repeat(pixels[None], channels, 0) if pixels.ndim == 2 else pixels


def room_in_memory() -> float:
    """How many bytes of images this process may keep."""
    worker = torch.utils.data.get_worker_info()
    free = psutil.virtual_memory().available
    return min(KEPT_BYTES, free / KEPT_SHARE) / (worker.num_workers if worker else 1)


def moved(pixels: np.ndarray, draw: np.random.Generator, mirror: bool) -> np.ndarray:
    """An image shifted by up to an eighth of its sides, its edge repeated. Shape: (C, height, width)."""
    for axis in (1, 2):
        size = pixels.shape[axis]
        shift = int(draw.integers(-(size // 8), size // 8 + 1))
        pixels = pixels.take(np.clip(np.arange(size) - shift, 0, size - 1), axis)
    return pixels[:, :, ::-1] if mirror and draw.random() < 0.5 else pixels
