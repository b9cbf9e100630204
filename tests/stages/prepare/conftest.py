"""Fixtures: a study with class folders, and one with unusable images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from prepared import make


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Folder of params.yaml with ten images of each of two classes in data/images."""
    for index, label in enumerate(("benign", "malignant")):
        for number in range(10):
            make(tmp_path / f"data/images/{label}/{number}.png", 100 * index + number)
    return tmp_path


@pytest.fixture
def broken(study: Path) -> Path:
    """The study with five unusable images added."""
    images = study / "data/images"
    make(images / "benign/truncated.jpg", 1, size=200)
    content = (images / "benign/truncated.jpg").read_bytes()
    (images / "benign/truncated.jpg").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (1, 1)).save(images / "benign/dot.png")
    (images / "malignant/text.png").write_text("not an image")
    (images / "malignant/empty.png").write_bytes(b"")
    make(images / "malignant/large.png", 2, size=300)
    return study
