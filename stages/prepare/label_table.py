"""Read the images of a study from a table, as written by people and spreadsheets."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import SPLITS, Split
from schemas.text import counted
from stages.prepare.error_text import did_you_mean, listed
from stages.prepare.excel_cells import Row
from stages.prepare.image_files import SkippedFile
from stages.prepare.label_cells import is_missing, join_labels, label_keys
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.table_cells import check_known, known, read_cells
from stages.prepare.table_columns import AUTO, SPLIT_WORDS, find_columns, split_of_word
from stages.tables import plain_cell

_ELEMENTS = {
    name.casefold(): name
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber", "PatientID")
}
"""Columns, in lower case, that probably have elements of DICOM headers."""


@dataclass(frozen=True)
class TableRows:
    """Images listed in a table."""

    items: list[LabelledImage]
    """Sorted by path."""
    unlabelled: list[LabelledImage]
    """Images without a label or split, where the settings allow them; sorted by path."""
    group_column: str | None
    """Column with the groups, or None if no group is known."""
    split_column: str | None
    """Column with predefined splits, or None if all splits are drawn."""
    notes: list[str]
    """Choices made from the header, as notes for the user."""
    unmatched: dict[str, str] = field(default_factory=dict)
    """Row of which there is no DICOM file -> reason."""
    skipped: list[SkippedFile] = field(default_factory=list)
    """Files that are not images, where the folder was searched."""


@dataclass(frozen=True)
class _Places:
    """The images of each row."""

    paths: list[list[str]]
    """Relative to the image folder; several of a row only if it names them by elements of DICOM."""
    notes: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)
    skipped: list[SkippedFile] = field(default_factory=list)


@dataclass(frozen=True)
class _Columns:
    """Cells of a table by column."""

    table: Path
    header: list[str]
    rows: list[Row]

    @property
    def lines(self) -> list[int]:
        return [line for line, _ in self.rows]

    def raw(self, name: str) -> list[str]:
        """Return the cells as they are in the file, all of which have a usable value."""
        cells = self._cells(name)
        check_known(self.table, name, self.lines, cells)
        return cells

    def plain(self, name: str | None) -> list[str]:
        """Return the cells without outer blanks; empty ones for no column."""
        if name is None:
            return [""] * len(self.rows)
        return [plain_cell(cell.strip()) for cell in self.raw(name)]

    def others(self, roles: Collection[str | None]) -> dict[str, list[str]]:
        """Return the plain cells of all columns without a role; those without a usable value are empty."""
        names = [name for name in self.header if name and name not in roles and self.header.count(name) == 1]
        return {name: [plain_cell(cell.strip()) for cell in known(self._cells(name))] for name in names}

    def _cells(self, name: str) -> list[str]:
        position = self.header.index(name)
        return [row[position] for _, row in self.rows]


def read_table(data: DataSettings, root: Path, images: Path) -> TableRows:
    """Read the rows of `data.labels`, sorted by path. Images are not opened.

    The formats are those of `read_cells`. Blanks around cells are removed. An empty group cell means that no patient is
    known, an empty split cell that the split is drawn.

    Raises:
        DataError: The file is missing or not a table, lacks a column, or has rows without a path or label, with a path
            outside of `images`, with a duplicate path, or with an unknown split. All rows with the same problem are
            listed.
    """
    if data.labels is None:
        raise DataError("data.labels is not set.")
    table = root / Path(data.labels).expanduser()
    needed = needed_columns(data)
    header, rows = read_cells(table, tuple(needed.values()))
    _check_header(table, header, needed)
    taken = (*_place_keys(data).values(), *label_keys(data).values())
    group_column, split_column, notes = find_columns(data, table.name, header, taken)
    # Lists take the place of a column, which they may contradict.
    split_column = split_column if data.split_files is None else None
    wrong_length = [line for line, row in rows if len(row) != len(header)]
    _check_rows(table, "does not have as many cells as the header", wrong_length)
    columns = _Columns(table, header, rows)
    lines = columns.lines
    places = _places(data, columns, images)
    labels = join_labels(data, str(table), lines, [columns.plain(name) for name in label_keys(data).values()])
    splits = _splits(table, lines, columns.plain(split_column), split_column)
    groups, sites = columns.plain(group_column), columns.plain(data.site_column)
    roles = {*taken, group_column, split_column, data.site_column}
    _check_kept(table, [name for name in data.keep_columns if name in roles])
    others = columns.others(roles)
    items: list[LabelledImage] = []
    unlabelled: list[LabelledImage] = []
    for at, label in enumerate(labels):
        row = LabelledImage(
            path="",
            label=label or "",
            group=None if is_missing(groups[at]) else groups[at],
            split=None if label is None else splits[at],
            site=None if is_missing(sites[at]) else sites[at],
            others={name: cells[at] for name, cells in others.items()},
            line=lines[at],
        )
        (items if label is not None else unlabelled).extend(replace(row, path=path) for path in places.paths[at])
    for some in (items, unlabelled):
        some.sort(key=lambda item: item.path)
    notes = [*notes, *places.notes]
    return TableRows(items, unlabelled, group_column, split_column, notes, places.unmatched, places.skipped)


def _check_kept(table: Path, names: list[str]) -> None:
    """Refuse columns that the manifest has in another place, or that are not to be stored."""
    if names:
        raise DataError(
            f"data.keep_columns names {counted(len(names), 'column')} of {table} that have another role.",
            listed(map(repr, names)),
            "Labels, patients, splits and sites are in the manifest without it; remove them from data.keep_columns.",
        )


def _place_keys(data: DataSettings) -> dict[str, str]:
    """Return setting -> column, for all columns that tell which images a row is about."""
    if data.tag_columns is None:
        return {"data.path_column": data.path_column}
    return {f"data.tag_columns.{keyword}": name for keyword, name in data.tag_columns.items()}


def _places(data: DataSettings, columns: _Columns, images: Path) -> _Places:
    table, lines = columns.table, columns.lines
    if data.tag_columns is None:
        return _Places(
            [[path] for path in _paths(table, lines, columns.raw(data.path_column), images, data.path_column)]
        )
    # Imported late, with the package that reads DICOM files.
    from stages.prepare.tag_keys import index_files, match_rows, without_files

    cells = [[" ".join(cell.split()) for cell in columns.plain(name)] for name in data.tag_columns.values()]
    for name, column in zip(data.tag_columns.values(), cells, strict=True):
        _check_rows(
            table, f"has no {name}", [line for line, cell in zip(lines, column, strict=True) if is_missing(cell)]
        )
    keys = list(zip(*cells, strict=True))
    files = index_files(images, data)
    paths, notes = match_rows(files, table.name, lines, keys, data.tag_columns)
    without = {line: key for line, key, some in zip(lines, keys, paths, strict=True) if not some}
    reasons = without_files(files, without, data.tag_columns)
    return _Places(paths, notes, {f"line {n} of {table.name}": why for n, why in reasons.items()}, files.skipped)


def needed_columns(data: DataSettings) -> dict[str, str]:
    """Return setting -> column, for all columns that the settings name."""
    named = {
        "data.group_column": None if data.group_column == AUTO else data.group_column,
        "data.split_column": None if data.split_column == AUTO else data.split_column,
        "data.site_column": data.site_column,
        **{f"data.keep_columns.{number}": name for number, name in enumerate(data.keep_columns)},
    }
    chosen = {key: name for key, name in named.items() if name is not None}
    return {**_place_keys(data), **label_keys(data), **chosen}


def check_files(items: Sequence[LabelledImage], images: Path, table: str) -> None:
    """Refuse a table that lists missing files.

    Raises:
        DataError: Lists all missing files.
    """
    # Path.exists raises for a name that is too long for the file system.
    missing = [item.path for item in items if not os.path.lexists(images / item.path)]
    if not missing:
        return
    cause = listed(missing)
    first = PurePosixPath(missing[0])
    if first.parts[0] == images.name and os.path.lexists(images.parent / first):
        cause += f"\nThe paths seem to start above {images}."
    raise DataError(
        f"{counted(len(missing), 'image')} of {counted(len(items), 'row')} in {table} not found in {images}.",
        cause,
        "Correct the paths or data.images (paths are relative to it), or set data.on_error: quarantine to continue "
        "without them.",
    )


def _check_header(table: Path, header: list[str], column_of: dict[str, str]) -> None:
    problems = [
        f"{key}: no column {name!r}{did_you_mean(name, header)}"
        if name not in header
        else f"{key}: {header.count(name)} columns {name!r}"
        for key, name in column_of.items()
        if header.count(name) != 1
    ]
    if problems:
        named = next((name for name in header if "".join(name.split()).casefold() in _ELEMENTS), None)
        element = None if named is None else _ELEMENTS["".join(named.split()).casefold()]
        hint = f" If rows are about DICOM files: data.tag_columns: {{{element}: {named}}}" if element else ""
        raise DataError(
            f"{table} does not have the columns named in the settings.",
            listed([*problems, f"existing columns: {', '.join(header)}"]),
            f"Correct the column names in params.yaml.{hint if 'data.path_column' in column_of else ''}",
        )


def _check_rows(table: Path, problem: str, lines: list[int]) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
        raise DataError(f"{counted(len(lines), 'row')} of {table} {problem}.", f"  lines {shown}", "Correct the CSV.")


def _paths(table: Path, lines: list[int], cells: list[str], images: Path, column: str) -> list[str]:
    """Return the paths of all rows, relative to `images`."""
    _check_rows(table, f"has no {column}", [n for n, cell in zip(lines, cells, strict=True) if not cell.strip()])
    paths: list[str] = []
    outside: list[str] = []
    for line, cell in zip(lines, cells, strict=True):
        path = _relative(cell, images)
        if path is None:
            outside.append(f"line {line}: {cell.strip()}")
        else:
            paths.append(path)
    if outside:
        raise DataError(
            f"{counted(len(outside), 'path')} in {table} outside of the image folder {images}.",
            listed(outside),
            "Set data.images to a folder that contains all of them.",
        )
    _check_twice(table, lines, paths)
    return paths


def _relative(cell: str, images: Path) -> str | None:
    """Return the path relative to `images`, or None if it is outside, where DVC would not notice changes."""
    stripped = cell.strip()
    usual = plain_cell(stripped).replace("\\", "/")
    # Outer blanks, backslashes and a leading apostrophe are part of the name if a file of that name exists. The escape
    # of our own tables is tried first, since only there the apostrophe has a fixed meaning.
    readings = (plain_cell(cell), plain_cell(stripped), usual, cell, stripped) if usual != cell else ()
    exact = (text for text in readings if text == posixpath.normpath(text) and os.path.lexists(images / text))
    plain = next(exact, posixpath.normpath(usual))
    if plain.startswith("/"):
        plain = posixpath.relpath(plain, posixpath.normpath(images.absolute().as_posix()))
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


def _splits(table: Path, lines: list[int], cells: list[str], column: str | None) -> list[Split | None]:
    """Return the split of each row, or None if the cell is empty."""
    splits = [None if is_missing(cell) else split_of_word(cell) for cell in cells]
    unknown = [
        f"line {line}: {cell!r}{did_you_mean(cell, SPLIT_WORDS)}"
        for line, cell, split in zip(lines, cells, splits, strict=True)
        if split is None and not is_missing(cell)
    ]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'row')} of {table} without a known split in column {column!r}.",
            listed(unknown),
            f"Splits are {', '.join(SPLITS)}; for an empty cell it is drawn. If the column has another meaning, set "
            "data.split_column: null in params.yaml.",
        )
    return splits


def read_paths(table: Path, path_column: str) -> list[str]:
    """Read one column of a table as paths, unchanged and in order; other columns are ignored.

    Raises:
        DataError: The file is missing or not a table, lacks the column, or has rows without a path.
    """
    header, rows = read_cells(table, (path_column,))
    if header.count(path_column) != 1:
        number = header.count(path_column)
        raise DataError(
            f"{table} has {counted(number, 'column') if number else 'no column'} named {path_column!r}"
            f"{did_you_mean(path_column, header) or '.'}",
            f"Existing columns: {', '.join(header)}.",
            "Name the column with the paths: --set data.path_column=NAME",
        )
    position = header.index(path_column)
    filled = [(line, row[position]) for line, row in rows if len(row) > position]
    check_known(table, path_column, [line for line, _ in filled], [cell for _, cell in filled])
    _check_rows(
        table,
        f"has no {path_column}",
        [line for line, row in rows if len(row) <= position or not row[position].strip()],
    )
    return [plain_cell(row[position]) for _, row in rows]
