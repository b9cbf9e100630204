"""Read labels, patients and splits of a download: from paths, from tables, or from DICOM headers and a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from schemas.errors import DataError, PlatformError
from schemas.recipes import DicomSides, Paths, Recipe, Sheet, Tables
from schemas.tasks import written
from stages.prepare.error_text import listed
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.recipes.download import Download, Images, Row, groups_of, read_lines, read_rows


@dataclass
class Found:
    """What a download contains."""

    images: list[LabelledImage] = field(default_factory=list)
    """Paths relative to the download; for arrays, to the folder of the written images."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> images."""


def read_paths(download: Download, recipe: Recipe, reading: Paths) -> Found:
    """Read labels and patients from paths."""
    pattern, found = re.compile(reading.pattern, re.IGNORECASE), Found()
    spelled = {label.casefold(): label for label in recipe.labels}
    for path in download.files:
        if (match := pattern.fullmatch(path)) is None:
            continue
        label = recipe.labels[spelled[match["label"].casefold()]]
        if label is not None:
            found.images.append(LabelledImage(path, label, match.groupdict().get("patient")))
    present = {image.label for image in found.images}
    download.missing += [f"images of {name!r}" for name in recipe.classes if name not in present]
    return found


def read_tables(download: Download, recipe: Recipe, reading: Tables) -> Found:
    """Read labels from tables, and which images belong together.

    Raises:
        DataError: A table cannot be read, or has a label that the recipe does not know.
    """
    found, groups = Found(), _groups(download, reading)
    for sheet in reading.sheets:
        table, images = download.find(sheet.file), download.images_in(sheet.folder)
        if table is None:
            continue
        rows = (
            read_lines(table, sheet.columns, sheet.delimiter)
            if sheet.columns
            else read_rows(table, (sheet.image, *sheet.labels))
        )
        _check_labels(table, recipe, sheet, rows)
        used = set()
        for row in rows:
            if (path := _image(download, sheet, images, row[sheet.image])) is None:
                continue
            used.add(path)
            label = _label(recipe, sheet, row)
            if label is None:
                found.left_out["without a label that the recipe uses"] += 1
                continue
            group = row.get(sheet.patient) or groups.get(PurePosixPath(path).stem.casefold())
            found.images.append(LabelledImage(path, label, group, sheet.split))
        if unlisted := len(images.paths - used):
            found.left_out[f"not in {PurePosixPath(sheet.file).name}"] += unlisted
    return found


def read_sides(download: Download, recipe: Recipe, reading: DicomSides) -> Found:
    """Read patient and side of each DICOM file from its header, and their label from a table.

    Raises:
        DataError: The table cannot be read, or a header is damaged.
        PlatformError: pydicom is not installed.
    """
    found, files = Found(), [name for name in download.files if name.lower().endswith(".dcm")]
    ends = [f"{reading.file}{suffix}" for suffix in (".csv", ".xlsx")]
    table = next((end for end in ends if any(name.endswith(end) for name in download.files)), ends[-1])
    path = download.find(table)
    if not files:
        download.missing.append("*.dcm")
    if path is None or not files:
        return found
    rows = read_rows(path, (reading.patient, reading.side, reading.label))
    labels = {(row[reading.patient], row[reading.side]): row[reading.label] for row in rows}
    for name, patient, side in _headers(download.root, files):
        label = recipe.labels.get(labels.get((patient, side), ""))
        if label is None:
            found.left_out[f"of a side without a label in {path.name}"] += 1
        else:
            found.images.append(LabelledImage(name, label, patient))
    return found


def _headers(root: Path, files: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield path, patient and side of each DICOM file."""
    try:
        pydicom: Any = import_module("pydicom")
    except ImportError:
        raise PlatformError(
            "pydicom is not installed.",
            "It reads the headers of DICOM files.",
            'Install it: pip install "fpt-vit[dicom]"',
        ) from None
    tags = ["PatientID", "ImageLaterality", "Laterality"]
    for name in files:
        try:
            header = pydicom.dcmread(root / name, stop_before_pixels=True, specific_tags=tags)
        except Exception as error:
            raise DataError(f"{root / name} is no readable DICOM file.", str(error), "Download it again.") from None
        side = header.get("ImageLaterality") or header.get("Laterality") or ""
        yield name, str(header.get("PatientID", "")).strip(), str(side).strip()


def _groups(download: Download, reading: Tables) -> dict[str, str]:
    if (groups := reading.groups) is None or (table := download.find(groups.file)) is None:
        return {}
    needed = (*groups.images, groups.group) if groups.group else groups.images
    return groups_of(read_rows(table, needed), groups.images, groups.group)


def _image(download: Download, sheet: Sheet, images: Images, cell: str) -> str | None:
    """Return the path of an image, or note that it is missing.

    Raises:
        DataError: Several images have the name.
    """
    paths = images.named(cell)
    if len(paths) > 1:
        raise download.ambiguous(cell, paths)
    if not paths and images.paths:
        download.missing.append(f"{sheet.folder}/{cell}")
    return paths[0] if paths else None


def _label(recipe: Recipe, sheet: Sheet, row: Row) -> str | None:
    """Return the label of a row in the notation of manifests; None: it is left out."""
    if len(sheet.labels) == 1:
        return recipe.labels.get(row[sheet.labels[0]])
    present = sorted(name for name in sheet.labels if row[name] == "1")
    return written(present) if recipe.task == "multilabel" else present[0]


def _check_labels(table: Path, recipe: Recipe, sheet: Sheet, rows: list[Row]) -> None:
    """Refuse a table with labels that the recipe does not know; an empty cell is no label.

    Raises:
        DataError: Lists them.
    """
    several = len(sheet.labels) > 1
    if several:
        unknown = {
            f"{row[sheet.image]}: {name} is {row[name]!r}"
            for row in rows
            for name in sheet.labels
            if row[name] not in ("0", "1")
        }
        if recipe.task != "multilabel":
            unknown |= {
                f"{row[sheet.image]}: not exactly one label is 1"
                for row in rows
                if sum(row[name] == "1" for name in sheet.labels) != 1
            }
    else:
        unknown = {repr(row[sheet.labels[0]]) for row in rows} - {repr(label) for label in (*recipe.labels, "")}
    if unknown:
        raise DataError(
            f"{table} has labels that the recipe does not know.",
            listed(sorted(unknown)),
            "It is another version of the table. Download it again, or use `fpt init --labels` with a table of yours.",
        )
