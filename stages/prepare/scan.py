"""Which images a study has and what is known of each: from class folders, or from a CSV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import DataError
from schemas.manifest import Split
from schemas.settings import DataSettings
from stages.prepare.listing import counted, listed

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
"""What counts as an image in a class folder; a CSV may name any file."""

_NOT_DATA = frozenset({"__MACOSX"})
"""Left in folders by archive tools."""


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


def scan_folders(images: Path) -> list[Item]:
    """The images below each first-level folder, which is their label; sorted by path.

    Deeper folders are read too, hidden files and folders (a dot first) are not.

    Raises:
        DataError: No class folders, a class folder without images, images outside of class folders, or a folder that
            may not be read.
    """
    entries = sorted(entry for entry in images.iterdir() if _is_data(entry.name))
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        raise DataError(
            f"{images} has no class folders.",
            "Without a CSV, the first-level folder of an image is its label.",
            "Make one folder per class, or name a CSV with data.labels in params.yaml.",
        )
    stray = [entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if stray:
        raise DataError(
            f"{counted(len(stray), 'image')} in {images} {'lies' if len(stray) == 1 else 'lie'} beside the class "
            "folders, so without a label.",
            listed(stray),
            "Move them into a class folder, or name a CSV with data.labels in params.yaml.",
        )
    found = {folder.name: sorted(_images_below(folder, images)) for folder in folders}
    empty = [f"{name} (other files there: {_others(images / name)})" for name, paths in found.items() if not paths]
    if empty:
        raise DataError(
            f"{counted(len(empty), 'class')} without any image in {images}.",
            listed(empty),
            f"Add images ({', '.join(sorted(SUFFIXES))}) or remove the folder.",
        )
    return sorted((Item(path, name) for name, paths in found.items() for path in paths), key=lambda item: item.path)


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


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name not in _NOT_DATA


def _images_below(folder: Path, images: Path) -> Iterator[str]:
    for file in _files_below(folder):
        if file.suffix.lower() in SUFFIXES:
            yield file.relative_to(images).as_posix()


def _others(folder: Path) -> str:
    names = {file.suffix.lower() or file.name for file in _files_below(folder)}
    return ", ".join(sorted(names)[:5]) or "none"


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        # os.walk passes over such folders in silence, and a study would lack images without a word.
        raise DataError(f"{error.filename} cannot be read.", f"{error.strerror}.", "Make it readable.") from error

    seen: set[tuple[int, int]] = set()
    # Links to folders are followed: large data sets are often linked into a study. A loop is entered once only.
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if _is_data(name))
        yield from (Path(here, name) for name in files if _is_data(name))
