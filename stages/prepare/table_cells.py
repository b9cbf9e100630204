"""Read the cells of a table as text: CSV, TSV, Parquet, or an Excel workbook."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.errors import DataError
from schemas.text import counted
from stages.prepare.error_text import listed
from stages.prepare.excel_cells import UNKNOWN, Row, excel_cells
from stages.prepare.table_text import EXCEL, PARQUET, decoded, file_kind, read_bytes
from stages.tables import plain_cell, safe_cell

_DELIMITERS = (",", ";", "\t", "|")


def read_cells(table: Path, needed: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Return the header, and (line, cells) of each row that is not blank.

    A text file is UTF-8 with or without a byte order mark, or UTF-16 with one. Its delimiter (comma, semicolon, tab or
    bar) is the one for which the header has the most needed columns. Excel: `excel_cells`. In a Parquet file, lines
    are counted from 1, missing values are empty, and whole numbers have no decimal point.

    Args:
        table: The file; its content tells its format.
        needed: Column names.

    Raises:
        DataError: The file is missing, damaged, in another format, or has no rows.
    """
    raw = read_bytes(table)
    kind = file_kind(raw)
    if kind == EXCEL:
        header, rows = excel_cells(table, raw, needed)
    elif kind == PARQUET:
        header, rows = _parquet_cells(table, raw)
    else:
        header, rows = _csv_cells(table, decoded(table, raw), needed)
    if not rows:
        raise DataError(f"{table} has no rows.", "It needs a header and one row per image.", "Correct data.labels.")
    return header, rows


def check_known(table: Path, name: str, lines: Sequence[int], cells: Sequence[str]) -> None:
    """Refuse a column that is used and has cells without a usable value.

    Raises:
        DataError: Lists all such cells.
    """
    unknown = [f"row {line}: {cell[1:]}" for line, cell in zip(lines, cells, strict=True) if cell.startswith(UNKNOWN)]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'cell')} of column {name!r} in {table} without a usable value.",
            listed(unknown),
            "Correct them in a spreadsheet program and save the file, which also stores the results of formulas.",
        )


def known(cells: Sequence[str]) -> list[str]:
    """Return the cells of a column that has no role; those without a usable value are empty."""
    return ["" if cell.startswith(UNKNOWN) else cell for cell in cells]


def written_cells(table: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return header and rows so that `read_cells` reads them from a CSV; those of a CSV stay as they are.

    Raises:
        DataError: A cell has no usable value.
    """
    for name, column in zip(header, zip(*rows, strict=True), strict=True):
        check_known(table, name, range(1, len(rows) + 1), column)
    if file_kind(read_bytes(table)) is None:
        return [list(header), *map(list, rows)]
    return [list(header), *([safe_cell(plain_cell(cell)) for cell in row] for row in rows)]


def _csv_cells(table: Path, text: str, needed: Sequence[str]) -> tuple[list[str], list[Row]]:
    reader = None
    try:
        headers = {delimiter: _header(text, delimiter) for delimiter in _DELIMITERS}
        best = max(_DELIMITERS, key=lambda mark: (len(set(needed) & set(headers[mark])), len(headers[mark])))
        # Strict, because an unclosed quote would otherwise merge all rows after it into one cell.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=best, skipinitialspace=True, strict=True)
        header = [cell.strip() for cell in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        line = "" if reader is None else f"Line {reader.line_num}: "
        raise DataError(f"{table} is not a CSV.", f"{line}{error}.", "Correct it, or save it as CSV UTF-8.") from error
    return header, [(line, row) for line, row in rows if any(cell.strip() for cell in row)]


def _header(text: str, delimiter: str) -> list[str]:
    first = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True), [])
    return [cell.strip() for cell in first]


def _parquet_cells(table: Path, raw: bytes) -> tuple[list[str], list[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(pa.BufferReader(raw)).read()
        columns = [[_text(value) for value in column.to_pylist()] for column in content.columns]
    except Exception as error:  # pyarrow raises many types for damaged bytes
        raise DataError(
            f"{table} cannot be read as Parquet.", f"{type(error).__name__}: {error}", "Save it as CSV UTF-8."
        ) from error
    header = [name.strip() for name in content.column_names]
    rows = [(line, list(row)) for line, row in enumerate(zip(*columns, strict=True), 1)]
    return header, [(line, row) for line, row in rows if any(cell.strip() for cell in row)]


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    # A column of whole numbers with a missing value is stored as floats.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value).replace(UNKNOWN, "")
