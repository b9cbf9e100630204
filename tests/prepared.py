"""What the tests of `prepare` share: images, tables, manifests, a run that succeeds, and one that fails."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import Manifest, ManifestRow, PrepareResult
from stages.manifest import read_manifest
from stages.prepare import prepare


def make(path: Path, number: int, size: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(study: Path, **settings: object) -> tuple[Manifest, PrepareResult]:
    output = study / "outputs" / "manifest"
    summary = prepare(DataSettings.model_validate(settings), study, output)
    return read_manifest(output / "manifest.parquet"), summary


def fails(study: Path, kind: type[DataError] = DataError, **settings: object) -> str:
    with pytest.raises(kind) as caught:
        run(study, **settings)
    assert caught.value.state and caught.value.repair
    assert not (study / "outputs").exists(), "nothing is written unless everything is right"
    return str(caught.value)


def table(study: Path, rows: list[dict[str, str]], name: str = "labels.csv") -> str:
    with (study / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def rows_of(study: Path) -> list[dict[str, str]]:
    """What the class folders say, as a table: two images a patient."""
    images = study / "data" / "images"
    return [
        {
            "path": path.relative_to(images).as_posix(),
            "label": path.parent.name,
            "patient": f"{path.parent.name}-{int(path.stem) // 2}",
        }
        for path in sorted(images.rglob("*.png"))
    ]


def manifest_of(rows: list[tuple[str, str | None, str]]) -> Manifest:
    """(label, group, content) of each image; every image starts in train."""
    made = (
        ManifestRow(
            id=hashlib.sha256(content.encode()).hexdigest(),
            path=f"{number:04d}.png",
            label=label,
            group=group or f"{number:04d}.png",
            split="train",
        )
        for number, (label, group, content) in enumerate(rows)
    )
    return Manifest(classes=tuple(sorted({label for label, _, _ in rows})), rows=tuple(made))


def by_patient(counts: dict[str, int], images: int = 3) -> Manifest:
    return manifest_of(
        [
            (label, f"{label}{patient}", f"{label}{patient}/{image}")
            for label, count in counts.items()
            for patient in range(count)
            for image in range(images)
        ]
    )
