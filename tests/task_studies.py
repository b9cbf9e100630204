"""Tiny studies with several labels an image, and with grades."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from study import Study, save_weights, study_of

LABELS = ("bars", "bright", "stripes")
GRADES = ("none", "mild", "strong", "severe")


def write_labels(root: Path, rows: list[dict[str, Any]]) -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_labelled(root: Path, images: int = 48) -> None:
    """Every combination of three patterns about equally often; two images a patient."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(72), np.arange(64))
    patterns = {"bars": 70 * (x // 6 % 2), "bright": 70 + 0 * x, "stripes": 70 * (y // 6 % 2)}
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(images):
        have = [name for place, name in enumerate(LABELS) if (number // 2) >> place & 1]
        pixels = sum((patterns[name] for name in have), np.zeros((64, 72))) + rng.integers(0, 45, (64, 72))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{number:03d}.png")
        flags = {name: int(name in have) for name in LABELS}
        rows.append({"path": f"{number:03d}.png", "label": "|".join(have), "patient": number // 2, **flags})
    write_labels(root, rows)


def draw_grades(root: Path, images: int = 48) -> None:
    """The grade is the strength of a pattern."""
    rng = np.random.default_rng(0)
    x, _ = np.meshgrid(np.arange(72), np.arange(64))
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(images):
        grade = number % len(GRADES)
        pixels = 60 * grade * (x // 6 % 2) + rng.integers(0, 75, (64, 72))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{number:03d}.png")
        rows.append({"path": f"{number:03d}.png", "label": GRADES[grade], "patient": number})
    write_labels(root, rows)


def task_study(root: Path, task: str, method: str = "fpt+", **sections: dict[str, Any]) -> Study:
    """Images, weights and settings of a task; prepared, not extracted."""
    (draw_grades if task == "ordinal" else draw_labelled)(root)
    save_weights(root / "lpm.safetensors")
    raw: dict[str, Any] = {
        "method": method,
        "data": {"task": task, "labels": "labels.csv", "images": "images", "group_column": "patient"},
        "lpm": {"name": "test_vit", "weights": "lpm.safetensors"},
        "features": {"image_size": 64, "shard_size": 8, "side_image_size": 40, "dtype": "float16"},
        "train": {"side_image_size": 32, "epochs": 2, "batch_size": 8, "side_reduction": 4, "prompts": 4},
        "compute": {"threads": 1, "device": "cpu"},
    }
    if task == "ordinal":
        raw["data"]["classes"] = GRADES
    return study_of(root, raw, sections)
