"""List the images of a study whose labels are the names of their first-level folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.text import counted
from stages.prepare.error_text import listed
from stages.prepare.image_files import SkippedFile, classify, find_image_files, is_hidden, skipped_lines, unreadable
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.patients import patient_folders
from stages.prepare.table_columns import AUTO, FOLDER, split_of_word


@dataclass(frozen=True)
class FolderScan:
    """Contents of the class folders, and other files at their level."""

    items: list[LabelledImage]
    """Images, sorted by path."""
    stray: list[str]
    """Names of images outside of the class folders, which have no label."""
    empty: dict[str, str]
    """Class folder without images -> description of what it contains instead."""
    skipped: list[SkippedFile]
    """All other files."""
    group_column: str | None
    """"folder" if the sub-folders of class folders are patients."""
    notes: list[str]
    """Choices made from the layout, as lines for the user."""


def images_folder(data: DataSettings, root: Path) -> Path:
    """Return the path of `data.images`.

    Args:
        data: Settings.
        root: Folder of `params.yaml`, where relative paths start.

    Raises:
        DataError: The folder does not exist.
    """
    folder = root / Path(data.images).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"There is no image folder at {folder}.",
            "It may have moved, or the path may be mistyped: a relative path starts at the folder of params.yaml.",
            "Correct data.images in params.yaml.",
        )
    return folder


def scan_folders(images: Path, group_column: str | None = AUTO) -> FolderScan:
    """List the images in each first-level folder, whose name is their label, at any depth.

    Args:
        images: Folder that contains the class folders.
        group_column: `data.group_column`, which decides whether sub-folders are patients.

    Raises:
        DataError: There are no class folders, the folders are named like splits, it is unclear whether sub-folders
            are patients, or a folder cannot be read.
    """
    paths_of: dict[str, list[str]] = {}
    stray: list[str] = []
    empty: dict[str, str] = {}
    skipped: list[SkippedFile] = []
    for entry in _entries(images):
        if is_hidden(entry.name) or not entry.is_dir():
            reason, named = classify(entry)
            if reason is None:
                stray.append(entry.name)
            else:
                skipped.append(SkippedFile(entry, reason, named))
            continue
        label = entry.name.strip()
        if label in paths_of:
            raise DataError(f"Two class folders in {images} are called {label!r}.", "", "Rename one of them.")
        contents = find_image_files(entry)
        skipped += contents.skipped
        paths_of[label] = [path.relative_to(images).as_posix() for path in contents.images]
        if not contents.images:
            empty[entry.name] = _describe(contents.skipped, entry)
    _check_layout(images, list(paths_of))
    groups, notes = patient_folders(paths_of, images, group_column)
    items = [LabelledImage(path, label, groups.get(path)) for label, paths in paths_of.items() for path in paths]
    folder = FOLDER if groups else None
    return FolderScan(sorted(items, key=lambda item: item.path), stray, empty, skipped, folder, notes)


def check_names(items: list[LabelledImage]) -> None:
    """Refuse paths that cannot be written to a table.

    Raises:
        DataError: A file name is not valid text.
    """
    invalid = [ascii(item.path) for item in items if not _is_text(item.path)]
    if invalid:
        raise DataError(
            f"{counted(len(invalid), 'file name')} with characters that are not text.", listed(invalid), "Rename them."
        )


def _is_text(name: str) -> bool:
    # Python represents bytes of a file name that are not UTF-8 as lone surrogates, which cannot be encoded.
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


def _describe(skipped: list[SkippedFile], folder: Path) -> str:
    """Describe the contents of a class folder without images, for an error message."""
    lines = skipped_lines(skipped, folder)
    return "; ".join(line[0].lower() + line[1:].removesuffix(".") for line in lines) or "it is empty"
