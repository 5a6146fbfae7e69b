"""Small pictures of test images that stand inside the report's files; needs no image library."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

LONGEST = 64  # pixels of a side


def thumbnail(image: Any) -> str:
    """An image as the data URI of a small PNG.

    Args:
        image: An image of Pillow's, or an array (H, W), (H, W, C) or (C, H, W); other numbers than bytes are stretched
            from black to white.
    """
    if hasattr(image, "convert"):
        image = image.convert("RGB")
        image.thumbnail((LONGEST, LONGEST))
    pixels = _bytes(_channels_last(np.asarray(image)))
    step = -(-max(pixels.shape[:2]) // LONGEST)
    return "data:image/png;base64," + base64.b64encode(_png(pixels[::step, ::step])).decode("ascii")


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """Grey or RGB. Shape: (H, W), (H, W, C) or (C, H, W) -> (H, W, 1 or 3)."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3:
        raise ValueError(f"An image has two or three axes, got the shape {pixels.shape}.")
    if pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[2] in (1, 3, 4):
        return pixels[:, :, :3]
    return pixels.mean(2, keepdims=True).astype(pixels.dtype)


def _bytes(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    return np.round(255 * (pixels - low) / (high - low or 1.0)).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """The PNG format, https://www.w3.org/TR/png: grey or RGB, eight bits, unfiltered. Shape: (H, W, 1 or 3)."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
