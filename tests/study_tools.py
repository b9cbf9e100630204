"""What the tests of whole commands share."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]


def draw_images(folder: Path, per_class: int = 20, seed: int = 0, prefix: str = "") -> Path:
    """Small images in class folders; the classes differ in brightness."""
    rng = np.random.default_rng(seed)
    for index, name in enumerate(("bright", "dark")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = rng.integers(0, 128, (72, 80, 3), dtype=np.uint8) + (0 if index else 100)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{prefix}{number:03d}.png")
    return folder
