"""Write predictions as CSV, TSV, Parquet or Excel, with the columns path, predicted, p_<class> and error.

With adaptation at test time, adapted_predicted and adapted_p_<class> come before error.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from schemas.errors import SettingsError
from schemas.results import ADAPTED, PROBABILITY, Prediction
from stages.files import atomic_write
from stages.tables import csv_text, safe_cell

EXCEL_ROWS = 1_048_576
"""Maximum number of rows of a worksheet."""

_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
"""Characters that XML cannot represent, and text that would be read as the escape of one."""


def predictions_csv(rows: Sequence[Prediction], delimiter: str = ",") -> str:
    """Format predictions as text.

    Probabilities have six digits; if no image is usable, these columns are missing. Text that a spreadsheet would run
    as a formula is escaped (`stages.tables.safe_cell`).
    """
    columns = _columns(rows)
    lines = [[*columns]]
    for at in range(len(rows)):
        cells = (values[at] for values in columns.values())
        lines.append(
            [f"{cell:.6f}" if isinstance(cell, float) else safe_cell(_encodable(cell or "")) for cell in cells]
        )
    return csv_text(lines, delimiter)


def write_predictions_table(rows: Sequence[Prediction], path: Path) -> None:
    """Write the table atomically, in the format given by the suffix of the file.

    Raises:
        SettingsError: The suffix is not supported, or there are too many rows for a worksheet.
        StorageError: The file cannot be written.
    """
    atomic_write(path, _format(path)(rows))


def check_suffix(path: Path) -> None:
    """Refuse a file name with an unsupported suffix, before anything is computed.

    Raises:
        SettingsError: Names the supported suffixes.
    """
    _format(path)


def _format(path: Path) -> Callable[[Sequence[Prediction]], bytes]:
    encode = _FORMATS.get(path.suffix.lower())
    if encode is None:
        raise SettingsError(
            f"Predictions cannot be written to {path}.",
            [("--output", f"{path.suffix or 'a name without a suffix'} is not a supported table format")],
            f"Choose a name that ends in {', '.join(_FORMATS)}.",
        )
    return encode


def _csv(rows: Sequence[Prediction]) -> bytes:
    return predictions_csv(rows).encode()


def _tsv(rows: Sequence[Prediction]) -> bytes:
    return predictions_csv(rows, "\t").encode()


def _parquet(rows: Sequence[Prediction]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = _columns(rows)
    arrays = [
        pa.array(values, pa.float64())
        if _is_probability(name)
        else pa.array([_encodable(value) if isinstance(value, str) else None for value in values], pa.string())
        for name, values in columns.items()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _excel(rows: Sequence[Prediction]) -> bytes:
    """Encode an Excel workbook with text cells, so that no cell is a formula."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    if len(rows) >= EXCEL_ROWS:
        raise SettingsError(
            f"{len(rows):,} predictions do not fit into an Excel worksheet.",
            repair="Choose a name that ends in .csv or .parquet.",
        )
    book = Workbook(write_only=True)
    sheet = book.create_sheet("predictions")

    def text(value: str | None) -> WriteOnlyCell:
        cell = WriteOnlyCell(sheet, _NOT_IN_XML.sub(_escaped, _encodable(value)) if value else None)
        # openpyxl takes text that starts with an equals sign for a formula.
        cell.data_type = "s" if value else "n"
        return cell

    columns = _columns(rows)
    sheet.append([text(name) for name in columns])
    for at in range(len(rows)):
        cells = ((name, values[at]) for name, values in columns.items())
        sheet.append([cell if _is_probability(name) else text(str(cell) if cell else None) for name, cell in cells])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def _escaped(match: re.Match[str]) -> str:
    """Escape a character as in Office Open XML: `_x000A_` for a line feed."""
    return f"_x{ord(match.group()):04X}_"


def _columns(rows: Sequence[Prediction]) -> dict[str, list[str | float | None]]:
    """Return the columns by name; without a usable image those of probabilities are missing."""
    classes = next((list(row.probabilities) for row in rows if row.probabilities is not None), [])
    columns: dict[str, list[str | float | None]] = {
        "path": [row.path for row in rows],
        "predicted": [row.predicted for row in rows],
    }
    for name in classes:
        columns[f"{PROBABILITY}{name}"] = [(row.probabilities or {}).get(name) for row in rows]
    if any(row.adapted_probabilities is not None for row in rows):
        columns[f"{ADAPTED}predicted"] = [row.adapted_predicted for row in rows]
        for name in classes:
            own = [(row.adapted_probabilities or {}).get(name) for row in rows]
            columns[f"{ADAPTED}{PROBABILITY}{name}"] = [*own]
    columns["error"] = [row.error for row in rows]
    return columns


def _is_probability(column: str) -> bool:
    return column.removeprefix(ADAPTED).startswith(PROBABILITY)


def _encodable(text: str) -> str:
    r"""Write bytes of file names that are not text as `\udcff`, so that any name can be stored."""
    return text.encode("utf-8", "backslashreplace").decode()


_FORMATS = {".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".xlsx": _excel}
