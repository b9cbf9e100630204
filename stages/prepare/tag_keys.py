"""Match the rows of a table with DICOM files by elements of their headers, for `data.tag_columns`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.text import counted
from stages.prepare.error_text import listed
from stages.prepare.image_files import SkippedFile, find_image_files
from stages.prepare.tag_filter import NO_IMAGE
from stages.prepare.tag_labels import check_keyword, header_values, tag_filter

INSTANCE = "SOPInstanceUID"
"""Element that no two files should share."""
Key = tuple[str, ...]
"""Values of the elements, in the order of the settings."""


@dataclass(frozen=True)
class TaggedFiles:
    """DICOM files below a folder by the values of some elements."""

    paths: Mapping[Key, list[str]]
    """Values -> paths relative to the folder, sorted."""
    lacking: Mapping[str, str]
    """Path of an image that no row can name -> reason."""
    skipped: list[SkippedFile]
    """Files that are not images."""
    notes: list[str]
    """What the filter left out, and remarks about the others."""


def index_files(images: Path, data: DataSettings) -> TaggedFiles:
    """Read the elements of every DICOM image below a folder once; pixels and other elements are not read.

    Args:
        images: Folder.
        data: Settings, with `tag_columns`.

    Raises:
        DataError: A keyword is unknown, or two files have one SOPInstanceUID and the settings match by it.
        PlatformError: pydicom is not installed.
    """
    keywords = tuple(data.tag_columns or {})
    for keyword in keywords:
        check_keyword(f"data.tag_columns.{keyword}", keyword)
    chosen = tag_filter(data)
    contents = find_image_files(images)
    paths: dict[Key, list[str]] = defaultdict(list)
    lacking: dict[str, str] = {}
    skipped = list(contents.skipped)
    for path, values in header_values(contents.images, (*keywords, *chosen.keywords)):
        name = path.relative_to(images).as_posix()
        if isinstance(values, str):
            lacking[name] = values
        elif not chosen.is_image(values):
            skipped.append(SkippedFile(path, NO_IMAGE, True))
        elif not chosen.passes(values):
            continue
        elif absent := [keyword for keyword in keywords if not values[keyword]]:
            lacking[name] = f"its header has no {' and no '.join(absent)}"
        else:
            paths[tuple("\\".join(values[keyword]) for keyword in keywords)].append(name)
    if INSTANCE in keywords:
        _check_instances(images, paths, keywords.index(INSTANCE))
    return TaggedFiles(paths, lacking, skipped, chosen.notes())


def match_rows(
    files: TaggedFiles, table: str, lines: Sequence[int], keys: Sequence[Key], tag_columns: Mapping[str, str]
) -> tuple[list[list[str]], list[str]]:
    """Return the files of each row, an empty list for none, and notes for the user.

    Raises:
        DataError: Two rows have the same values; all of them are listed.
    """
    first: dict[Key, int] = {}
    twice = [
        f"lines {first[key]} and {line}"
        for line, key in zip(lines, keys, strict=True)
        if first.setdefault(key, line) != line
    ]
    names = " and ".join(tag_columns)
    if twice:
        raise DataError(
            f"{counted(len(twice), 'row')} of {table} with the {names} of another row.",
            listed(twice),
            "Keep one row for each, or add an element that tells them apart to data.tag_columns, such as Laterality.",
        )
    matched = [files.paths.get(key, []) for key in keys]
    number = sum(map(len, matched))
    notes = [f"{counted(number, 'DICOM file')} match {counted(len(keys), 'row')} of {table} by {names}.", *files.notes]
    others = sorted(path for key, some in files.paths.items() if key not in first for path in some)
    if others:
        notes.append(_left_out(others, f"no row of {table} has their {names}"))
    if files.lacking:
        reasons = sorted(set(files.lacking.values()))
        notes.append(_left_out(sorted(files.lacking), "; ".join(reasons[:3])))
    return matched, notes


def without_files(files: TaggedFiles, keys: Mapping[int, Key], tag_columns: Mapping[str, str]) -> dict[int, str]:
    """Return line -> reason for rows without a file; spreadsheets remove leading zeros, which is named."""
    alike = {tuple(map(_plain, key)) for key in files.paths}
    reason = f"no DICOM file has its {' and '.join(tag_columns)}"
    nearly = ", but one has it with other leading zeros, blanks or case"
    return {line: reason + (nearly if tuple(map(_plain, key)) in alike else "") for line, key in keys.items()}


def _plain(text: str) -> str:
    return "".join(text.split()).casefold().lstrip("0")


def _left_out(paths: Sequence[str], reason: str) -> str:
    shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    return f"{counted(len(paths), 'image')} left out, because {reason}: {shown}"


def _check_instances(images: Path, paths: Mapping[Key, list[str]], position: int) -> None:
    files: dict[str, list[str]] = defaultdict(list)
    for key, some in paths.items():
        files[key[position]] += some
    twice = [f"{uid}: {', '.join(sorted(some))}" for uid, some in sorted(files.items()) if len(some) > 1]
    if twice:
        raise DataError(
            f"{counted(len(twice), INSTANCE)} of several files in {images}.",
            listed(twice) + "\nIt is unknown which of these files a row of the table means.",
            "Keep one file of each.",
        )
