"""What the tests of whole commands share."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from command_line import Fpt
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


def prepared_study(folder: Path, weights: Path, fpt: Fpt, **features: Any) -> Path:
    """A prepared study of 40 images on timm's smallest ViT; nothing is extracted."""
    draw_images(folder / "images")
    params = {
        "method": "linear",
        "data": {"images": "images"},
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "shard_size": 8, **features},
        "train": {"epochs": 2, "batch_size": 8, "lr": 1e-3},
        "compute": {"device": "cpu", "threads": 1},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    fpt("prepare", cwd=folder)
    return folder
