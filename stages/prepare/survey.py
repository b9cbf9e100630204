"""Everything that lies in a folder: the images, and by name or number what is passed over."""

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
"""An image by its name: if it cannot be read, that is an error. Any other file is an image by its content."""

_ARCHIVE_FOLDERS = frozenset({"__MACOSX"})
"""Left in folders by archive tools."""

_SHOWN = 5


@dataclass(frozen=True)
class PassedOver:
    """A file or folder in which no image is read."""

    path: Path
    reason: str
    """Such as "DICOM, not read yet" or ".txt"."""
    named: bool
    """Whether its owner may take it for an image, so that messages name it; other files are counted only."""


@dataclass(frozen=True)
class Survey:
    """What lies in a folder."""

    images: list[Path]
    """Sorted; each starts with the folder."""
    passed_over: list[PassedOver]
    """Sorted by path."""


def survey(folder: Path) -> Survey:
    """List the images below a folder, at any depth, and whatever is passed over.

    Files with a suffix of `SUFFIXES` are images; any other file is one if its first bytes are those of an image that
    can be read. Links are followed, and each folder is read once. Hidden files and folders (a dot first) are passed
    over. No pipe or device is opened.

    Raises:
        DataError: A folder or file below it cannot be read.
    """
    images: list[Path] = []
    passed_over: list[PassedOver] = []
    for path, reason, named in _walk(folder, set()):
        if reason is None:
            images.append(path)
        else:
            passed_over.append(PassedOver(path, reason, named))
    return Survey(sorted(images), sorted(passed_over, key=lambda one: one.path))


def classify(path: Path) -> tuple[str | None, bool]:
    """Why a path that is no folder is passed over, and whether messages name it; (None, False) for an image.

    Raises:
        DataError: It cannot be read.
    """
    if is_hidden(path.name):
        return "hidden", False
    suffix = path.suffix.strip().lower()
    # Also a broken link or a pipe of such a name: an image is expected there, and reading it reports what is wrong.
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
    return (None, False) if is_read(kind) else (f"{kind}, not read yet", True)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by an archive tool."""
    return name.startswith(".") or name in _ARCHIVE_FOLDERS


def unreadable(path: Path | str, error: OSError) -> DataError:
    """The error for a folder or file that may not be read: without it, a study would lack images unnoticed."""
    return DataError(f"{path} cannot be read.", f"{error.strerror}.", "Make it readable.")


def passed_over_lines(passed_over: Iterable[PassedOver], folder: Path) -> list[str]:
    """Describe what was passed over, one line per kind; other files than images in one line.

    Args:
        passed_over: From `survey`.
        folder: Paths are shown relative to it.
    """
    named: dict[str, list[str]] = defaultdict(list)
    others: Counter[str] = Counter()
    for one in passed_over:
        if one.named:
            named[one.reason].append(one.path.relative_to(folder).as_posix())
        else:
            others[one.reason] += 1
    lines = []
    for reason, paths in sorted(named.items()):
        rest = f", ... and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        lines.append(f"Passed over {counted(len(paths), 'file')} ({reason}): {', '.join(paths[:_SHOWN])}{rest}")
    if others:
        kinds = ", ".join(f"{number} {reason}" for reason, number in others.most_common(_SHOWN))
        rest = ", ..." if len(others) > _SHOWN else ""
        what = "that is no image" if others.total() == 1 else "that are no images"
        lines.append(f"Passed over {counted(others.total(), 'file')} {what} ({kinds}{rest}).")
    return lines


_SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str | None, bool]]:
    """Each file below a folder, with the reason to pass it over and whether to name it."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = here.stat()
            # Links to folders are followed: large data sets are often linked into a study. A loop ends here.
            if (status.st_dev, status.st_ino) in seen:
                yield here, "link to a folder that is read already", True
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise unreadable(here, error) from error
        folders = []
        for entry in listed:
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
