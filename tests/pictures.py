"""Synthetic pictures of one kind: each resembles the others as radiographs do, and has structure of its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: int = 96) -> Image.Image:
    """A smooth picture that depends on its number: a bright body that all share, and coarse structure of its own."""
    rng = np.random.default_rng([7, number])
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    values = 150 * np.exp(-((x / 0.7) ** 4) - (y / 0.8) ** 4)
    for _ in range(24):
        (cx, cy), width, height = rng.uniform(-0.9, 0.9, 2), rng.uniform(0.08, 0.25), rng.normal(0, 25)
        values += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
    return Image.fromarray(np.clip(values + 40, 0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def recompressed(image: Image.Image) -> Image.Image:
    """The picture at a third of its size with visible JPEG artefacts."""
    buffer = io.BytesIO()
    image.resize((image.width // 3, image.height // 3), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=40)
    return Image.open(buffer)


def brightened(image: Image.Image) -> Image.Image:
    return image.point(lambda value: min(255, round(0.85 * value + 30)))
