"""Which images a study has and what is known of each: from class folders, or from a CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from schemas.errors import DataError
from schemas.manifest import Split
from schemas.settings import DataSettings
from schemas.text import counted
from stages.prepare.columns import AUTO, FOLDER, split_of_word
from stages.prepare.listing import listed
from stages.prepare.patients import patient_folders
from stages.prepare.survey import PassedOver, classify, is_hidden, passed_over_lines, survey, unreadable


@dataclass(frozen=True)
class Item:
    """One image as the user named it, before its file is opened."""

    path: str
    """Relative to the folder of images, with forward slashes."""
    label: str
    """As a manifest writes it; empty only where an image may have several labels, and has none."""
    group: str | None = None
    """Patient; None: not known."""
    split: Split | None = None
    """Ready split; None: to be drawn."""


def images_folder(data: DataSettings, root: Path) -> Path:
    """Where `data.images` is.

    Args:
        data: Settings.
        root: Folder of `params.yaml`, where relative paths start.

    Raises:
        DataError: There is no such folder.
    """
    folder = root / Path(data.images).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"There is no folder of images at {folder}.",
            "It may have moved, or the path may be mistyped: a relative path starts at the folder of params.yaml.",
            "Correct data.images in params.yaml.",
        )
    return folder


@dataclass(frozen=True)
class FolderScan:
    """What lies in the class folders, and beside them."""

    items: list[Item]
    """Images, sorted by path."""
    stray: list[str]
    """Images beside the class folders, so without a label."""
    empty: dict[str, str]
    """Class folder without any image -> what lies in it instead."""
    passed_over: list[PassedOver]
    """Everything else."""
    group_column: str | None
    """"folder" where the sub-folders of class folders are patients."""
    notes: list[str]
    """What was chosen by the layout, for people."""


def scan_folders(images: Path, group_column: str | None = AUTO) -> FolderScan:
    """List the images below each first-level folder, which is their label; deeper folders are read too.

    Args:
        images: Folder of the class folders.
        group_column: As `data.group_column`: which sub-folders are patients.

    Raises:
        DataError: No class folders, folders that name splits instead of classes, sub-folders that may or may not be
            patients, or a folder that may not be read.
    """
    found: dict[str, list[str]] = {}
    stray: list[str] = []
    empty: dict[str, str] = {}
    passed_over: list[PassedOver] = []
    for entry in _entries(images):
        if is_hidden(entry.name) or not entry.is_dir():
            reason, named = classify(entry)
            if reason is None:
                stray.append(entry.name)
            else:
                passed_over.append(PassedOver(entry, reason, named))
            continue
        label = entry.name.strip()
        if label in found:
            raise DataError(f"Two class folders in {images} are called {label!r}.", "", "Rename one of them.")
        below = survey(entry)
        passed_over += below.passed_over
        found[label] = [path.relative_to(images).as_posix() for path in below.images]
        if not below.images:
            empty[entry.name] = _instead(below.passed_over, entry)
    _check_layout(images, list(found))
    groups, notes = patient_folders(found, images, group_column)
    items = [Item(path, label, groups.get(path)) for label, paths in found.items() for path in paths]
    folder = FOLDER if groups else None
    return FolderScan(sorted(items, key=lambda item: item.path), stray, empty, passed_over, folder, notes)


def check_names(items: list[Item]) -> None:
    """Refuse paths that no table can hold.

    Raises:
        DataError: A file name is not valid text.
    """
    strange = [ascii(item.path) for item in items if not _is_text(item.path)]
    if strange:
        raise DataError(
            f"{counted(len(strange), 'file name')} with characters that are not text.", listed(strange), "Rename them."
        )


def _is_text(name: str) -> bool:
    # Bytes that are not UTF-8 come out of the file system as lone surrogates, which cannot be encoded again.
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _entries(images: Path) -> list[Path]:
    try:
        return sorted(images.iterdir())
    except OSError as error:
        raise unreadable(images, error) from error


def _check_layout(images: Path, labels: list[str]) -> None:
    if not labels:
        raise DataError(
            f"{images} has no class folders.",
            "Without a CSV, the first-level folder of an image is its label.",
            "Make one folder per class, or name a CSV with data.labels in params.yaml.",
        )
    if all(split_of_word(label) for label in labels):
        raise DataError(
            f"The first-level folders of {images} name splits, not classes: {', '.join(labels)}.",
            "Without a CSV, the first-level folder of an image is its label.",
            "Write a CSV with the columns path, label and split, and name it with data.labels in params.yaml.",
        )


def _instead(passed_over: list[PassedOver], folder: Path) -> str:
    lines = passed_over_lines(passed_over, folder)
    return "; ".join(line[0].lower() + line[1:].removesuffix(".") for line in lines) or "nothing is in it"
