"""Read the cells of an Excel workbook (.xlsx) as text, and mark those whose value is not known."""

from __future__ import annotations

import datetime
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from schemas.errors import DataError
from stages.prepare.error_text import did_you_mean, listed

if TYPE_CHECKING:
    from openpyxl import Workbook

UNKNOWN = "\0"
"""First character of a cell without a usable value; the reason follows. No text of a table contains it."""

_MAX_BYTES = 4 * 2**30
"""Size of an unpacked workbook."""
_EXACT = 10**15
"""Excel rounds whole numbers from here on."""
_ZEROS = re.compile("0+")
"""Number format of identifiers with leading zeros, such as 00000."""
_MIDNIGHT = datetime.time()

Row = tuple[int, list[str]]


class _Sheet(NamedTuple):
    title: str
    header: list[str]
    first_row: int
    rows: list[Row]


def excel_cells(table: Path, raw: bytes, needed: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Return the header, and (row number, cells) of each row below it that is not blank.

    The sheet is the only visible one whose first row that is not blank has the needed columns. Whole numbers have no
    decimal point, and leading zeros if the format of the cell has them (00000). Dates are written as 2024-05-31, true
    and false in lower case.

    Args:
        table: File name for messages.
        raw: Content of the file.
        needed: Column names, which tell the sheet.

    Raises:
        DataError: The workbook is damaged or too large, several sheets have the columns, or cells are merged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise DataError(f"{table} is too large for a table.", "It unpacks to more than 4 GiB.")
            merged = any(_has_merged_cells(archive, name) for name in archive.namelist())
        sheets = list(_sheets(raw))
        sheet = _choose(table, sheets, needed)
        if merged:
            _check_merged(table, raw, sheet)
    except DataError:
        raise
    # openpyxl raises nearly anything on damaged workbooks.
    except Exception as error:
        raise DataError(
            f"{table} cannot be read as an Excel workbook.",
            f"{type(error).__name__}: {error}",
            "Open it in a spreadsheet program and save it as CSV UTF-8.",
        ) from error
    return sheet.header, sheet.rows


def _sheets(raw: bytes) -> Iterator[_Sheet]:
    from openpyxl import load_workbook

    # Twice: one shows the stored results of formulas, the other which cells are formulas.
    results = load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    formulas = load_workbook(io.BytesIO(raw), read_only=True)
    for result, formula in zip(results.worksheets, formulas.worksheets, strict=True):
        if result.sheet_state == "visible":
            # The stored size of a sheet may be wrong.
            result.reset_dimensions()
            formula.reset_dimensions()
            yield _sheet(result.title, result.iter_rows(), formula.iter_rows())


def _sheet(title: str, results: Iterator[Any], formulas: Iterator[Any]) -> _Sheet:
    header: list[str] = []
    first_row, rows = 0, []
    for number, (cells, sources) in enumerate(zip(results, formulas, strict=True), 1):
        texts = [_text(cell, source) for cell, source in zip(cells, sources, strict=True)]
        while texts and not texts[-1].strip():
            texts.pop()
        if not texts:
            continue
        if not header:
            header, first_row = [text.strip() for text in texts], number
        else:
            rows.append((number, texts + [""] * (len(header) - len(texts))))
    return _Sheet(title, header, first_row, rows)


def _text(cell: Any, source: Any) -> str:
    value = cell.value
    if value is None:
        return f"{UNKNOWN}a formula without a stored result" if source.data_type == "f" else ""
    if cell.data_type == "e":
        return f"{UNKNOWN}the error {value}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value, str(cell.number_format))
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == _MIDNIGHT else value.isoformat(" ")
    # The character marks unknown values only.
    return str(value).replace(UNKNOWN, "")


def _number(value: float, number_format: str) -> str:
    if value != int(value):
        return repr(value)
    if abs(value) >= _EXACT:
        return f"{UNKNOWN}a number with more than 15 digits, which Excel has rounded: format the column as text"
    padded = len(number_format) if _ZEROS.fullmatch(number_format) else 0
    return str(int(value)).zfill(padded)


def _choose(table: Path, sheets: list[_Sheet], needed: Sequence[str]) -> _Sheet:
    filled = [sheet for sheet in sheets if sheet.header]
    if not filled:
        raise DataError(f"{table} has no rows.", "It needs a header and one row per image.", "Correct data.labels.")
    fitting = [sheet for sheet in filled if set(needed) <= set(sheet.header)]
    if len(fitting) > 1:
        raise DataError(
            f"{table} has several sheets with the columns {', '.join(needed)}.",
            listed(repr(sheet.title) for sheet in fitting),
            "Hide all sheets but one, or save the right one as CSV UTF-8.",
        )
    if fitting:
        return fitting[0]
    if len(filled) > 1:
        raise DataError(
            f"{table} has no sheet with the columns named in the settings.",
            listed(
                f"{sheet.title}: no column {name!r}{did_you_mean(name, sheet.header)}"
                for sheet in filled
                for name in needed
                if name not in sheet.header
            ),
            "Correct the column names in params.yaml. The first row that is not empty has to be the header.",
        )
    return filled[0]


def _has_merged_cells(archive: zipfile.ZipFile, name: str) -> bool:
    if not name.startswith("xl/worksheets/"):
        return False
    with archive.open(name) as file:
        before = b""
        while part := file.read(2**20):
            if b"<mergeCell " in before + part:
                return True
            before = part[-16:]
    return False


def _check_merged(table: Path, raw: bytes, sheet: _Sheet) -> None:
    """Refuse merged cells in the table: all but one of them look empty, such as the patients of several rows."""
    from openpyxl import load_workbook

    workbook: Workbook = load_workbook(io.BytesIO(raw))
    ranges = [str(area) for area in workbook[sheet.title].merged_cells.ranges if area.max_row >= sheet.first_row]
    if ranges:
        raise DataError(
            f"{table} has merged cells in the sheet {sheet.title!r}.",
            listed(sorted(ranges)),
            "Unmerge them, and fill in the value in each cell.",
        )
