"""The labels table and the data settings of a study that a recipe makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.data_settings import REST
from schemas.errors import DataError
from schemas.manifest import Split
from schemas.recipes import Arrays, DicomSides, Recipe, Tables
from stages.files import atomic_write
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.recipes.arrays import write_arrays
from stages.prepare.recipes.download import Download
from stages.prepare.recipes.readers import Found, read_paths, read_sides, read_tables
from stages.tables import csv_text, safe_cell

IMAGES, LABELS = "images", "labels.csv"
"""Folder of written images and table of labels, in the study."""


def read_download(recipe: Recipe, source: Path, study: Path) -> Found:
    """Read a download; only arrays are written, as images into the study.

    Args:
        recipe: Of which data set.
        source: Folder of the download; nothing in it is changed.
        study: Folder of the study.

    Raises:
        DataError: Parts of the download are missing, or not what the recipe expects.
        PlatformError: A package is missing.
    """
    download, reading = Download(source, recipe), recipe.reading
    if isinstance(reading, Arrays):
        found = write_arrays(download, recipe, reading, study / IMAGES)
    elif isinstance(reading, DicomSides):
        found = read_sides(download, recipe, reading)
    elif isinstance(reading, Tables):
        found = read_tables(download, recipe, reading)
    else:
        found = read_paths(download, recipe, reading)
    download.check_complete()
    found.images.sort(key=lambda image: image.path)
    return found


def find_lists(recipe: Recipe, source: Path, shots: int, draw: int) -> dict[Split, str]:
    """Return split -> file of a published few-shot draw, or rest, for `data.split_files`.

    Args:
        recipe: Of which data set.
        source: Folder of the download.
        shots: Patients or images per class, as in the names of the files.
        draw: Number of the draw.

    Raises:
        DataError: The recipe has no lists, or their files are missing.
    """
    if not recipe.lists:
        raise DataError(
            f"No few-shot lists of {recipe.title} are known.", "", "Set data.shots, which draws the images per class."
        )
    download, found = Download(source, recipe), dict[Split, str]()
    for split, end in recipe.lists.items():
        if (path := download.find(end.format(shots=shots, draw=draw))) is not None:
            found[split] = str(path.resolve())
    download.check_complete()
    return {**found, "test": REST}


def write_labels(study: Path, recipe: Recipe, images: Sequence[LabelledImage]) -> None:
    """Write the table of labels.

    Raises:
        StorageError: It cannot be written.
    """
    columns = {
        "path": [safe_cell(image.path) for image in images],
        "label": [safe_cell(image.label) for image in images],
    }
    if recipe.group:
        columns[recipe.group] = [safe_cell(image.group or "") for image in images]
    if recipe.has_splits:
        columns["split"] = [image.split or "" for image in images]
    atomic_write(study / LABELS, csv_text([list(columns), *zip(*columns.values(), strict=True)]).encode())


def data_settings(recipe: Recipe, source: Path) -> dict[str, Any]:
    """Return the settings `data` of the study.

    Args:
        recipe: Of which data set.
        source: Folder of the download.
    """
    return {
        "task": recipe.task,
        "images": IMAGES if recipe.writes_images else str(source.expanduser().resolve()),
        "labels": LABELS,
        "group_column": recipe.group or None,
        "split_column": "split" if recipe.has_splits else None,
        "classes": list(recipe.classes),
    }
