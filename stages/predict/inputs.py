"""Find the images that command-line arguments name: files, folders, patterns, lists and tables of paths."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from stages.files import read_regular
from stages.prepare.image_files import SkippedFile, classify, find_image_files, skipped_lines
from stages.prepare.label_table import read_paths

TABLES = (".csv", ".tsv", ".parquet", ".xlsx")
LISTS = (".txt",)


@dataclass
class Inputs:
    """Images to predict, and notes for the user."""

    images: list[Path] = field(default_factory=list)
    """In the order of the arguments; files that were named individually may be missing or not images."""
    notes: list[str] = field(default_factory=list)
    """Descriptions of skipped files."""


def find_images(words: Sequence[str], data: DataSettings, root: Path) -> Inputs:
    """List the images that command-line arguments name.

    An argument is an image, a folder (all images below it), a pattern such as `images/*.png` (`**`: folders at any
    depth), `@list.txt` or a .txt file with a path per line, or a table (.csv, .tsv, .parquet, .xlsx) with the column
    `data.path_column`. A relative path in a list or table is looked up in the folder of that file, then in the working
    directory, then in `data.images`.

    Args:
        words: Arguments as typed.
        data: Settings.
        root: Folder of `params.yaml`.

    Raises:
        DataError: A folder or pattern has no images, or a list or table cannot be read.
    """
    inputs = Inputs()
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            _add_folder(inputs, path)
        elif word.startswith("@") and not path.exists():
            _add_listed(inputs, _read_list(Path(word[1:]).expanduser()), Path(word[1:]).expanduser(), data, root)
        elif path.suffix.lower() in LISTS:
            _add_listed(inputs, _read_list(path), path, data, root)
        elif path.suffix.lower() in TABLES:
            _add_listed(inputs, read_paths(path, data.path_column), path, data, root)
        elif glob.has_magic(word) and not path.exists():
            _add_pattern(inputs, path)
        else:
            inputs.images.append(path)
    return inputs


def _add_folder(inputs: Inputs, folder: Path) -> None:
    contents = find_image_files(folder)
    lines = skipped_lines(contents.skipped, folder)
    if not contents.images:
        raise DataError(
            f"{folder} has no images.",
            "\n".join(lines),
            "Name a folder that contains images, or the images themselves.",
        )
    inputs.images += contents.images
    inputs.notes += lines


def _add_pattern(inputs: Inputs, pattern: Path) -> None:
    images: dict[Path, None] = {}
    skipped: dict[Path, SkippedFile] = {}
    matches = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))  # noqa: PTH207  (any pattern)
    for path in matches:
        if path.is_dir():
            contents = find_image_files(path)
            images |= dict.fromkeys(contents.images)
            skipped |= {file.path: file for file in contents.skipped}
            continue
        reason, named = classify(path)
        if reason is None:
            images[path] = None
        else:
            skipped[path] = SkippedFile(path, reason, named)
    base = pattern
    while glob.has_magic(str(base)):
        base = base.parent
    lines = skipped_lines(skipped.values(), base)
    if not images:
        cause = "\n".join(lines) or "No file matches; a relative pattern starts at the working directory."
        raise DataError(f"{pattern} matches no images.", cause, "Correct the pattern.")
    inputs.images += images
    inputs.notes += lines


def _add_listed(inputs: Inputs, names: Sequence[str], file: Path, data: DataSettings, root: Path) -> None:
    starts = (file.parent, Path(), root / Path(data.images).expanduser())
    for name in names:
        # The unstripped name first: a file may be called "x.png ".
        candidates = [start / Path(spelled).expanduser() for start in starts for spelled in (name, name.strip())]
        inputs.images.append(next((path for path in candidates if path.exists()), candidates[1]))


def _read_list(file: Path) -> list[str]:
    try:
        text = read_regular(file).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(
            f"The list of images {file} cannot be read.",
            f"{error.strerror}.",
            "Name a text file with one path per line.",
        ) from None
    # File names may contain the other separators of splitlines.
    names = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not names:
        raise DataError(f"The list of images {file} is empty.", repair="Write one path per line.")
    return names
