"""The files of an original download, found at any depth, and what of them is missing."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from schemas.errors import DataError
from schemas.recipes import Recipe
from schemas.text import counted
from stages.prepare.error_text import listed
from stages.prepare.image_files import SUFFIXES, find_image_files
from stages.prepare.table_cells import check_known, read_cells
from stages.prepare.table_text import decoded, read_bytes

Row = dict[str, str]
"""Column -> cell of a table."""
AGAIN = "Download it again from the source of the recipe."


class Download:
    """The files below a folder, by their relative paths with forward slashes; nothing is ever written there."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        """List the files.

        Raises:
            DataError: The folder is missing, or a part of it cannot be read.
        """
        if not root.is_dir():
            raise DataError(
                f"{root} is not a folder.",
                f"--source is the folder with the original download of {recipe.title}.",
                f"Download it from {recipe.source}, unpack it, and name its folder.",
            )
        self.root, self.recipe = root, recipe
        contents = find_image_files(root)
        skipped = [file.path for file in contents.skipped if file.reason != "hidden" and not file.path.is_dir()]
        self.files = sorted(path.relative_to(root).as_posix() for path in (*contents.images, *skipped))
        self.missing: list[str] = []

    def find(self, end: str) -> Path | None:
        """Return the file whose path ends like this, ignoring case; else note that it is missing.

        Raises:
            DataError: Several files match.
        """
        found = [name for name in self.files if f"/{name.casefold()}".endswith(f"/{end.casefold()}")]
        if len(found) > 1:
            raise self.ambiguous(end, found)
        if not found:
            self.missing.append(end)
            return None
        return self.root / found[0]

    def images_in(self, folder: str) -> Images:
        """Return the images of the folders whose path ends like this, ignoring case; notes if there are none."""
        pattern = f"*/{folder.casefold()}"
        found = [
            name
            for name in self.files
            if fnmatchcase(f"/{PurePosixPath(name.casefold()).parent}", pattern)
            and PurePosixPath(name).suffix.lower() in SUFFIXES
        ]
        if not found:
            self.missing.append(f"{folder}/ (no images)")
        return Images(found)

    def ambiguous(self, name: str, found: Sequence[str]) -> DataError:
        """Return the error for a name that several files have."""
        return DataError(
            f"{name} is there {counted(len(found), 'time')} below {self.root}.",
            listed(found),
            "Name the folder of one copy with --source.",
        )

    def check_complete(self) -> None:
        """Refuse a download of which parts are missing.

        Raises:
            DataError: Lists all of them.
        """
        if self.missing:
            raise DataError(
                f"{self.root} is not a complete download of {self.recipe.title}: "
                f"{counted(len(self.missing), 'part')} missing.",
                listed(self.missing),
                f"Expected, at any depth: {', '.join(self.recipe.layout)}. Source: {self.recipe.source}",
            )


class Images:
    """Images of a folder, looked up as tables name them: with or without folder, suffix and capitals."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Index them.

        Args:
            paths: Relative paths.
        """
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            name = PurePosixPath(path.casefold())
            self._by_name[name.name].append(path)
            self._by_stem[name.stem].append(path)
        self.paths = frozenset(paths)

    def named(self, cell: str) -> list[str]:
        """Return the paths of the images with this name: one, or none, or several."""
        name = PurePosixPath(cell.replace("\\", "/").casefold())
        stem = name.stem if name.suffix in SUFFIXES else name.name
        return self._by_name.get(name.name) or self._by_stem.get(stem, [])


def read_rows(table: Path, needed: Sequence[str]) -> list[Row]:
    """Read a table with a header.

    Raises:
        DataError: The file cannot be read, a column is missing, or a row is cut.
    """
    header, numbered = read_cells(table, needed)
    if absent := [name for name in needed if name not in header]:
        raise DataError(
            f"{table} has no column {', '.join(map(repr, absent))}.",
            f"Its columns are {', '.join(header)}: it is another table, or another version of it.",
            AGAIN,
        )
    rows = _rows(table, header, [cells for _, cells in numbered])
    for name in needed:
        check_known(table, name, [line for line, _ in numbered], [row[name] for row in rows])
    return rows


def read_lines(table: Path, columns: Sequence[str], delimiter: str) -> list[Row]:
    """Read a text table without a header.

    Args:
        table: File.
        columns: Names of its columns.
        delimiter: Separator of the columns.

    Raises:
        DataError: The file cannot be read, or a row is cut.
    """
    text = decoded(table, read_bytes(table))
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return _rows(table, columns, [row for row in cells if any(cell.strip() for cell in row)])


def _rows(table: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Row]:
    if short := [row for row in rows if len(row) < len(header)]:
        raise DataError(
            f"{counted(len(short), 'row')} of {table} with fewer cells than columns.",
            listed(", ".join(row) for row in short),
            AGAIN,
        )
    return [{name: _plain(cell) for name, cell in zip(header, row, strict=False)} for row in rows]


def _plain(cell: str) -> str:
    """Return a cell without blanks, and a whole number without decimals: 1.0 becomes 1."""
    text = cell.strip()
    return text[:-2] if text.endswith(".0") and text[:-2].isdecimal() else text


def groups_of(rows: Sequence[Mapping[str, str]], images: Sequence[str], group: str) -> dict[str, str]:
    """Return the group of each image by its stem, ignoring case.

    Args:
        rows: Rows of a table.
        images: Columns with names of images.
        group: Column with the group; empty: the images of a row are one group, named after the first.
    """
    found: dict[str, str] = {}
    for row in rows:
        stems = [PurePosixPath(row[name].casefold()).stem for name in images if row[name]]
        for stem in stems:
            found[stem] = row[group] if group else stems[0]
    return found
