"""Find the image files in a folder, and report every file that is skipped."""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import DataError
from schemas.text import counted
from stages.image_kinds import image_kind, is_read

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
"""Suffixes of images: such a file that cannot be read is an error. Other files are classified by their content."""

_ARCHIVE_FOLDERS = frozenset({"__MACOSX"})
"""Folders that archive tools leave behind."""

_SHOWN = 5


@dataclass(frozen=True)
class SkippedFile:
    """A file, or a link to a folder, that is not read as an image."""

    path: Path
    reason: str
    """Such as "GIF, not read yet" or ".txt"."""
    named: bool
    """Whether the user may take it for an image, so that messages give its name; other files are only counted."""


@dataclass(frozen=True)
class FolderContents:
    """Images and skipped files of a folder."""

    images: list[Path]
    """Sorted; each path starts with the folder."""
    skipped: list[SkippedFile]
    """Sorted by path."""


def find_image_files(folder: Path) -> FolderContents:
    """List the images below a folder, at any depth, and the files that are skipped.

    Files with a suffix of `SUFFIXES` are images; any other file is an image if its first bytes are those of a
    supported format. Links are followed, and each folder is read once. Hidden files and folders (a leading dot) are
    skipped. Pipes and devices are never opened.

    Raises:
        DataError: A folder or file below it cannot be read.
    """
    images: list[Path] = []
    skipped: list[SkippedFile] = []
    for path, reason, named in _walk(folder, set()):
        if reason is None:
            images.append(path)
        else:
            skipped.append(SkippedFile(path, reason, named))
    return FolderContents(sorted(images), sorted(skipped, key=lambda file: file.path))


def classify(path: Path) -> tuple[str | None, bool]:
    """Return why a path that is not a folder is skipped, and whether messages name it; (None, False) for an image.

    Raises:
        DataError: The file cannot be read.
    """
    if is_hidden(path.name):
        return "hidden", False
    suffix = path.suffix.strip().lower()
    # A broken link or a pipe with such a name counts as an image: reading it will raise the error.
    if suffix in SUFFIXES:
        return None, False
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "broken link", True
    except OSError as error:
        return f"link that cannot be followed ({(error.strerror or 'unknown').lower()})", True
    if not stat.S_ISREG(mode):
        return _SPECIAL.get(stat.S_IFMT(mode), "no regular file"), True
    try:
        kind = image_kind(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if kind is None:
        return suffix or "no suffix", False
    if is_read(kind):
        return None, False
    return (kind if kind.startswith("DICOM") else f"{kind}, not read yet"), True


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by an archive tool."""
    return name.startswith(".") or name in _ARCHIVE_FOLDERS


def unreadable(path: Path | str, error: OSError) -> DataError:
    """Return the error for a folder or file without read permission; skipping it would silently shrink the study."""
    return DataError(f"{path} cannot be read.", f"{error.strerror}.", "Make it readable.")


def skipped_lines(skipped: Iterable[SkippedFile], folder: Path) -> list[str]:
    """Describe skipped files: one line per kind of named file, and one line for all others.

    Args:
        skipped: From `find_image_files`.
        folder: Paths are shown relative to it.
    """
    paths_by_reason: dict[str, list[str]] = defaultdict(list)
    others: Counter[str] = Counter()
    for file in skipped:
        if file.named:
            paths_by_reason[file.reason].append(file.path.relative_to(folder).as_posix())
        else:
            others[file.reason] += 1
    lines = []
    for reason, paths in sorted(paths_by_reason.items()):
        rest = f", ... and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        lines.append(f"Skipped {counted(len(paths), 'file')} ({reason}): {', '.join(paths[:_SHOWN])}{rest}")
    if others:
        kinds = ", ".join(f"{number} {reason}" for reason, number in others.most_common(_SHOWN))
        rest = ", ..." if len(others) > _SHOWN else ""
        description = "that is not an image" if others.total() == 1 else "that are not images"
        lines.append(f"Skipped {counted(others.total(), 'file')} {description} ({kinds}{rest}).")
    return lines


_SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str | None, bool]]:
    """Yield each file below a folder, with the result of `classify`."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = here.stat()
            # Links to folders are followed: large data sets are often linked into a study. This check ends loops.
            if (status.st_dev, status.st_ino) in seen:
                yield here, "link to a folder that is read already", True
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                by_name = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise unreadable(here, error) from error
        folders = []
        for entry in by_name:
            path = here / entry.name
            if is_hidden(entry.name):
                yield path, "hidden", False
            elif _is_folder(entry):
                folders.append(path)
            else:
                yield path, *classify(path)
        waiting.extend(reversed(folders))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
