"""Small image files for tests, and the reason why one is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.errors import ImageError
from stages.images import read_image

MAX = 250_000_000


def gradient(width: int = 40, height: int = 30) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1).astype(np.uint8)


def noise(size: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG with any header, whatever its data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def reason(path: Path, *, max_pixels: int = MAX, min_side: int = 1) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, max_pixels=max_pixels, min_side=min_side)
    assert caught.value.path == str(path)
    return caught.value.reason


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def encoded(suffix: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (noise(96) if image is None else image).save(buffer, suffix, **options)
    return buffer.getvalue()


def accepted(path: Path) -> list[str]:
    """Warnings about a file that is read all the same."""
    warnings: list[str] = []
    read_image(path, max_pixels=MAX, accept=warnings.append)
    return warnings
