"""Which images the words of a command line name: files, folders, patterns, lists and tables of paths."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import DataError
from schemas.settings import DataSettings
from stages.files import read_regular
from stages.prepare.image_files import SkippedFile, classify, find_image_files, skipped_lines
from stages.prepare.label_table import read_paths

TABLES = (".csv", ".tsv")
LISTS = (".txt",)


@dataclass
class Inputs:
    """What was found."""

    images: list[Path] = field(default_factory=list)
    """In the order in which they were named; files named one by one may be missing or no images."""
    notes: list[str] = field(default_factory=list)
    """What was passed over, one line each."""


def find_images(words: Sequence[str], data: DataSettings, root: Path) -> Inputs:
    """List the images that words name.

    A word is an image, a folder (all images below it), a pattern such as `images/*.png` (`**`: folders at any depth),
    `@list.txt` or a .txt file with a path per line, or a .csv or .tsv table with the column `data.path_column`. A
    relative path in a list or table starts at the folder of that file, else at the working directory, else at
    `data.images`: the first place where it exists.

    Args:
        words: As typed.
        data: Settings.
        root: Folder of `params.yaml`.

    Raises:
        DataError: A folder or pattern has no images, or a list or table cannot be read.
    """
    found = Inputs()
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            _add_folder(found, path)
        elif word.startswith("@") and not path.exists():
            _add_listed(found, _read_list(Path(word[1:]).expanduser()), Path(word[1:]).expanduser(), data, root)
        elif path.suffix.lower() in LISTS:
            _add_listed(found, _read_list(path), path, data, root)
        elif path.suffix.lower() in TABLES:
            _add_listed(found, read_paths(path, data.path_column), path, data, root)
        elif glob.has_magic(word) and not path.exists():
            _add_pattern(found, path)
        else:
            found.images.append(path)
    return found


def _add_folder(found: Inputs, folder: Path) -> None:
    below = find_image_files(folder)
    lines = skipped_lines(below.skipped, folder)
    if not below.images:
        raise DataError(f"{folder} has no images.", "\n".join(lines), "Name a folder with images, or the images.")
    found.images += below.images
    found.notes += lines


def _add_pattern(found: Inputs, pattern: Path) -> None:
    images: dict[Path, None] = {}
    skipped: dict[Path, SkippedFile] = {}
    matches = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))  # noqa: PTH207  (any pattern)
    for path in matches:
        if path.is_dir():
            below = find_image_files(path)
            images |= dict.fromkeys(below.images)
            skipped |= {one.path: one for one in below.skipped}
            continue
        reason, named = classify(path)
        if reason is None:
            images[path] = None
        else:
            skipped[path] = SkippedFile(path, reason, named)
    fixed = pattern
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    lines = skipped_lines(skipped.values(), fixed)
    if not images:
        cause = "\n".join(lines) or "No file has such a name; a relative pattern starts at the working directory."
        raise DataError(f"{pattern} matches no images.", cause, "Correct the pattern.")
    found.images += images
    found.notes += lines


def _add_listed(found: Inputs, names: Sequence[str], file: Path, data: DataSettings, root: Path) -> None:
    starts = (file.parent, Path(), root / Path(data.images).expanduser())
    for name in names:
        # With its blanks first: a file may be called "x.png ".
        places = [start / Path(spelled).expanduser() for start in starts for spelled in (name, name.strip())]
        found.images.append(next((place for place in places if place.exists()), places[1]))


def _read_list(file: Path) -> list[str]:
    try:
        text = read_regular(file).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(
            f"The list of images {file} cannot be read.", f"{error.strerror}.", "Name a file with a path per line."
        ) from None
    # Not splitlines: file names may hold its other separators.
    names = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not names:
        raise DataError(f"The list of images {file} is empty.", repair="Write a path per line.")
    return names
