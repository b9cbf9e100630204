"""Read the bytes of a table, tell its format, and decode the text of a CSV."""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path

from schemas.errors import DataError

_MAX_BYTES = 4 * 2**30
"""A row per image takes about 100 bytes."""
_PROBED_BYTES = 2**16
"""Bytes at the start that are checked for binary content."""
_WIDE = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16."""

EXCEL = "an Excel workbook (XLSX)"
PARQUET = "a Parquet file"

_BINARY = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook (XLS)"),
    (b"PAR1", PARQUET),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF document"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a pickle, which is never loaded"),
    (b"\x80\x03", "a pickle, which is never loaded"),
    (b"\x80\x04", "a pickle, which is never loaded"),
    (b"\x80\x05", "a pickle, which is never loaded"),
)


def file_kind(raw: bytes) -> str | None:
    """Return the format of a binary file in words, such as `EXCEL` or `PARQUET`; None for text."""
    return None if raw.startswith(_WIDE) else _binary_kind(raw)


def decoded(table: Path, raw: bytes) -> str:
    """Decode the text of a CSV: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
        DataError: It is not text.
    """
    wide = raw.startswith(_WIDE)
    kind = file_kind(raw)
    if kind is not None:
        raise DataError(
            f"{table} is {kind}, not a table.",
            "Tables are CSV, TSV, Parquet or Excel (.xlsx).",
            "Save it as CSV UTF-8 and name the new file instead.",
        )
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 text.", f"Byte {error.start} is not valid.", "Save it as CSV UTF-8."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{table} is not text: it contains the character NUL.",
            "It may be UTF-16 without a byte order mark, or not a table.",
            "Save it as CSV UTF-8.",
        )
    return text


def read_bytes(table: Path) -> bytes:
    """Read a table completely; of a binary file that is no table only the beginning.

    Raises:
        DataError: The file is missing, not a regular file, or too large.
    """
    try:
        status = table.stat()
        # Checked first because opening a pipe would block until a writer appears, and a device may never end.
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "It is a pipe, a socket or a device"
            raise DataError(f"{table} cannot be read.", f"{kind}, not a file.", "Name a regular file.")
        with table.open("rb") as file:
            start = file.read(_PROBED_BYTES)
            if b"\0" in start and not start.startswith((*_WIDE, b"PK\x03\x04", b"PAR1")):
                return start
            if status.st_size > _MAX_BYTES:
                raise DataError(
                    f"{table} is too large for a table: {status.st_size / 2**30:,.1f} GiB.",
                    "",
                    "Correct data.labels, or remove unneeded columns.",
                )
            return start + file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"There is no table at {table}.",
            "It may have moved, or the path may be mistyped: a relative path starts at the folder of params.yaml.",
            "Correct data.labels in params.yaml.",
        ) from None
    except OSError as error:
        raise DataError(f"{table} cannot be read.", f"{error.strerror}.", "Name a readable table.") from error


def _binary_kind(raw: bytes) -> str | None:
    if raw.startswith(b"PK\x03\x04"):
        return _zip_kind(raw)
    return next((kind for magic, kind in _BINARY if raw.startswith(magic)), None)


def _zip_kind(raw: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = archive.namelist()
    # Damaged archives raise nearly anything.
    except Exception:
        names = []
    if any(name.startswith("xl/") for name in names):
        return EXCEL
    if "mimetype" in names and "content.xml" in names:
        return "an OpenDocument spreadsheet (ODS)"
    return "a ZIP archive"
