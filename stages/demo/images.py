"""Images whose class is fine detail: visible at 518 pixels, gone at 144."""

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
"""Degrees; each is a class."""
PERIODS = (3.6, 4.2)
"""Pixels, (shortest, longest). A bicubic reduction from 518 to 144 pixels leaves nothing of a period of 3.6, and of
4.2 in the obliquest direction, where it is 4.9 along the rows or columns, a tenth at most."""
AMPLITUDE = 10.0
"""Of the grating, in grey levels of 255."""
GRAIN = 5.0
"""Standard deviation of the pixel noise, in grey levels: drowns what the reduction leaves of the grating."""
_JITTER = 6.0  # degrees: one orientation is a range, not one frequency to memorise
_BLOBS = ((5, 34.0), (13, 20.0), (33, 12.0))  # smooth noise: (cells a side, standard deviation in grey levels)


def make_demo_images(
    folder: Path, images: int = 200, size: int = 518, seed: int = 0, progress: Progress | None = None
) -> int:
    """Write grey PNGs of smooth noise into class folders; three faint gratings tell the classes apart.

    Each image depends on (seed, its number) alone: files that are already there are kept, and more can be added.

    Args:
        folder: Gets one folder a class, named by the orientation of its grating.
        images: How many in all; the classes take turns.
        size: Side in pixels.
        seed: Another seed gives other images of the same kind.
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
    """One image.

    Args:
        orientation: Of the grating, in degrees.
        size: Side in pixels.
        random: Source of all that is not the class.

    Returns:
        (size, size) uint8.
    """
    grey = np.full((size, size), random.uniform(108, 148), dtype=np.float32)
    for cells, deviation in _BLOBS:
        coarse = Image.fromarray(random.standard_normal((cells, cells), dtype=np.float32) * np.float32(deviation))
        grey += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    angle = math.radians(orientation + random.uniform(-_JITTER, _JITTER))
    frequency, phase = 2 * math.pi / random.uniform(*PERIODS), random.uniform(0, 2 * math.pi)
    across, down = (np.arange(size) * (frequency * part) for part in (math.cos(angle), math.sin(angle)))
    grey += (AMPLITUDE * np.sin(across[None, :] + down[:, None] + phase)).astype(np.float32)
    grey += random.standard_normal((size, size), dtype=np.float32) * np.float32(GRAIN)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)
