"""Draw images whose class depends on fine detail that is visible at 518 pixels and lost at 144."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.files import atomic_write
from stages.progress import Progress

ORIENTATIONS = (0, 60, 120)
"""Orientation of the grating of each class, in degrees."""
PERIODS = (3.6, 4.2)
"""Shortest and longest period in pixels. A bicubic reduction from 518 to 144 pixels removes a period of 3.6 completely.
A period of 4.2 keeps at most a tenth of its amplitude, in the most oblique orientation (4.9 along rows or columns)."""
AMPLITUDE = 10.0
"""Amplitude of the grating, in grey levels of 255."""
GRAIN = 5.0
"""Standard deviation of the pixel noise in grey levels, which masks what the reduction leaves of the grating."""
_JITTER = 6.0  # degrees: each class has a range of orientations rather than a single frequency to memorise
_BLOBS = ((5, 34.0), (13, 20.0), (33, 12.0))  # smooth noise: (cells per side, standard deviation in grey levels)


def make_demo_images(
    folder: Path, images: int = 200, size: int = 518, seed: int = 0, progress: Progress | None = None
) -> int:
    """Write grey PNGs of smooth noise into class folders; the classes differ in the orientation of a faint grating.

    Each image depends only on (seed, its number), so existing files are kept and more images can be added.

    Args:
        folder: Parent of the class folders, which are named by the orientation of the grating.
        images: Total number of images; the classes alternate.
        size: Side in pixels.
        seed: Seed of all images.
        progress: Called with (done, total).

    Returns:
        Number of files written.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    written = 0
    for number in range(images):
        orientation = ORIENTATIONS[number % len(ORIENTATIONS)]
        path = folder / f"grating_{orientation:03d}" / f"{number:04d}.png"
        if not path.is_file():
            content = io.BytesIO()
            Image.fromarray(draw(orientation, size, np.random.default_rng([seed, number]))).save(
                content, "PNG", compress_level=1
            )
            atomic_write(path, content.getvalue())
            written += 1
        if progress is not None:
            progress(number + 1, images)
    return written


def draw(orientation: float, size: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image.

    Args:
        orientation: Orientation of the grating, in degrees.
        size: Side in pixels.
        random: Generator of noise, jitter and phase.

    Returns:
        (size, size) uint8.
    """
    grey = np.full((size, size), random.uniform(108, 148), dtype=np.float32)
    for cells, deviation in _BLOBS:
        coarse = Image.fromarray(random.standard_normal((cells, cells), dtype=np.float32) * np.float32(deviation))
        grey += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    angle = math.radians(orientation + random.uniform(-_JITTER, _JITTER))
    frequency, phase = 2 * math.pi / random.uniform(*PERIODS), random.uniform(0, 2 * math.pi)
    across, down = (np.arange(size) * (frequency * factor) for factor in (math.cos(angle), math.sin(angle)))
    grey += (AMPLITUDE * np.sin(across[None, :] + down[:, None] + phase)).astype(np.float32)
    grey += random.standard_normal((size, size), dtype=np.float32) * np.float32(GRAIN)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)
