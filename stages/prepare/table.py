"""Which images a study has, from a CSV as people and spreadsheets write it."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from schemas.errors import DataError
from schemas.manifest import SPLITS, Split
from schemas.settings import DataSettings
from stages.prepare.labels import join_labels, label_keys
from stages.prepare.listing import counted, did_you_mean, listed
from stages.prepare.scan import Item

_DELIMITERS = (",", ";", "\t", "|")


def read_table(data: DataSettings, root: Path, images: Path) -> list[Item]:
    """The rows of `data.labels`, sorted by path. Files are not looked at.

    UTF-8 with or without a byte order mark, or UTF-16 with one; the separator (comma, semicolon, tab, bar) is the one
    under which the header has the columns that the settings name. Blanks around cells are dropped. An image without
    an entry in the group column stands for itself.

    Raises:
        DataError: The file is missing or no CSV, lacks a column, or has rows without path or label, with a path
            outside of `images`, with a path twice, or with an unknown split. All rows of one kind are listed.
    """
    if data.labels is None:
        raise DataError("data.labels is not set.")
    table = root / Path(data.labels).expanduser()
    wanted = {"data.path_column": data.path_column, **label_keys(data)}
    if data.group_column is not None:
        wanted["data.group_column"] = data.group_column
    if data.split_column is not None:
        wanted["data.split_column"] = data.split_column
    header, rows = _cells(table, _text(table), tuple(wanted.values()))
    _check_header(table, header, wanted)
    _check_rows(table, "does not have as many cells as the header", [n for n, row in rows if len(row) != len(header)])

    def column(name: str | None) -> list[str]:
        return [""] * len(rows) if name is None else [row[header.index(name)] for _, row in rows]

    paths = column(data.path_column)
    lines = [number for number, _ in rows]
    _check_rows(table, f"has no {data.path_column}", _where(lines, [not path for path in paths]))
    cells = [column(name) for name in label_keys(data).values()]
    if data.task != "multilabel":
        _check_rows(table, f"has no {data.label_column}", _where(lines, [not label for label in cells[0]]))
    labels = join_labels(data, str(table), lines, cells)
    relative = [_relative(path, images) for path in paths]
    outside = [f"line {n}: {path}" for n, path, inside in zip(lines, paths, relative, strict=True) if inside is None]
    if outside:
        raise DataError(
            f"{counted(len(outside), 'path')} in {table} outside of the folder of images {images}.",
            listed(outside),
            "Set data.images to a folder that holds all of them.",
        )
    _check_twice(table, lines, [path or "" for path in relative])
    splits = _splits(table, lines, column(data.split_column)) if data.split_column else [None] * len(rows)
    items = [
        Item(path or "", label, group or None, split)
        for path, label, group, split in zip(relative, labels, column(data.group_column), splits, strict=True)
    ]
    return sorted(items, key=lambda item: item.path)


def check_files(items: Sequence[Item], images: Path, table: str) -> None:
    """Refuse a table that names files that are not there.

    Raises:
        DataError: All missing files are listed.
    """
    missing = [item.path for item in items if not (images / item.path).exists()]
    if not missing:
        return
    cause = listed(missing)
    first = PurePosixPath(missing[0])
    if first.parts[0] == images.name and (images.parent / first).exists():
        cause += f"\nThe paths seem to start above {images}."
    raise DataError(
        f"{counted(len(missing), 'image')} of {counted(len(items), 'row')} in {table} not found in {images}.",
        cause,
        "Correct the paths or data.images (paths are relative to it), or set data.on_error: quarantine to go on "
        "without them.",
    )


def _text(table: Path) -> str:
    try:
        raw = table.read_bytes()
        wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"There is no CSV at {table}.",
            "It may have moved, or the path may be mistyped: a relative path starts at the folder of params.yaml.",
            "Correct data.labels in params.yaml.",
        ) from None
    except OSError as error:
        raise DataError(f"{table} cannot be read.", f"{error.strerror}.", "Correct data.labels.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 text.", f"Byte {error.start} is not valid.", "Save it as CSV UTF-8."
        ) from error


def _cells(table: Path, text: str, wanted: tuple[str, ...]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and (line, cells) of each row that is not blank."""
    try:
        headers = {
            delimiter: _strip(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))
            for delimiter in _DELIMITERS
        }
        best = max(_DELIMITERS, key=lambda one: (len(set(wanted) & set(headers[one])), len(headers[one])))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=best, skipinitialspace=True)
        header = _strip(next(reader, []))
        rows = [(reader.line_num, _strip(row)) for row in reader]
    except csv.Error as error:
        raise DataError(f"{table} is not a CSV.", f"{error}.", "Save it as CSV UTF-8.") from error
    rows = [(number, row) for number, row in rows if any(row)]
    if not rows:
        raise DataError(f"{table} has no rows.", "A header and one row per image are needed.", "Correct data.labels.")
    return header, rows


def _strip(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _check_header(table: Path, header: list[str], wanted: dict[str, str]) -> None:
    problems = [
        f"{key}: no column {name!r}{did_you_mean(name, header)}"
        if name not in header
        else f"{key}: {header.count(name)} columns {name!r}"
        for key, name in wanted.items()
        if header.count(name) != 1
    ]
    if problems:
        raise DataError(
            f"{table} does not have the columns that the settings name.",
            listed([*problems, f"columns there: {', '.join(header)}"]),
            "Correct the column names in params.yaml.",
        )


def _where(lines: list[int], flags: list[bool]) -> list[int]:
    return [number for number, flag in zip(lines, flags, strict=True) if flag]


def _check_rows(table: Path, problem: str, lines: list[int]) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
        raise DataError(f"{counted(len(lines), 'row')} of {table} {problem}.", f"  lines {shown}", "Correct the CSV.")


def _relative(path: str, images: Path) -> str | None:
    """Below `images`, or None. Outside of it DVC would not see a change."""
    plain = posixpath.normpath(path.replace("\\", "/"))
    if plain.startswith("/"):
        absolute = posixpath.normpath(images.absolute().as_posix())
        plain = posixpath.relpath(plain, absolute)
    return None if plain.split("/")[0] in ("..", ".") else plain


def _check_twice(table: Path, lines: list[int], paths: list[str]) -> None:
    first: dict[str, int] = {}
    twice = [
        f"{path}: lines {first[path]} and {number}"
        for number, path in zip(lines, paths, strict=True)
        if first.setdefault(path, number) != number
    ]
    if twice:
        raise DataError(f"{counted(len(twice), 'path')} twice in {table}.", listed(twice), "Keep one row per image.")


def _splits(table: Path, lines: list[int], values: list[str]) -> list[Split | None]:
    known: dict[str, Split] = {split: split for split in SPLITS}
    unknown = [
        f"line {number}: {value!r}{did_you_mean(value, SPLITS)}"
        for number, value in zip(lines, values, strict=True)
        if value not in known
    ]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'row')} of {table} without a known split.",
            listed(unknown),
            f"Splits are {', '.join(SPLITS)}.",
        )
    return [known[value] for value in values]


def read_paths(table: Path, path_column: str) -> list[str]:
    """The paths in one column of a table, in its order, as they are written. Other columns are not looked at.

    Raises:
        DataError: The file is missing or no CSV, lacks the column, or has rows without a path.
    """
    header, rows = _cells(table, _text(table), (path_column,))
    if header.count(path_column) != 1:
        number = header.count(path_column)
        raise DataError(
            f"{table} has {counted(number, 'column') if number else 'no column'} named {path_column!r}"
            f"{did_you_mean(path_column, header) or '.'}",
            f"Columns there: {', '.join(header)}.",
            "Name the column of the paths: --set data.path_column=NAME",
        )
    at = header.index(path_column)
    _check_rows(table, f"has no {path_column}", [number for number, row in rows if len(row) <= at or not row[at]])
    return [row[at] for _, row in rows]
