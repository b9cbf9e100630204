"""Write CSV files that are safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

_STARTS_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
"""A first character that makes a spreadsheet evaluate the cell, after any apostrophes of earlier escapes."""
_ESCAPED = re.compile(r"'+[=+\-@\t\r\n]")


def safe_cell(text: str) -> str:
    """Escape a text cell that a spreadsheet would evaluate as a formula with a leading apostrophe.

    For text only (paths, labels, groups, reasons): a number such as -0.5 stays a number. `plain_cell` is the inverse
    for every text.
    """
    return f"'{text}" if _STARTS_FORMULA.match(text) else text


def plain_cell(cell: str) -> str:
    """Remove the apostrophe that `safe_cell` added; other cells are returned unchanged."""
    return cell[1:] if _ESCAPED.match(cell) else cell


def csv_text(rows: Iterable[Sequence[str]], delimiter: str = ",") -> str:
    """Format rows as CSV, each ending with a line feed; a carriage return in a cell does not end the row."""
    text = io.StringIO()
    minimal, quote_all = (
        csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=quoting)
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    for row in rows:
        # The writer quotes only its own line terminator, but readers end a row at a carriage return too, and outer
        # blanks are part of a cell only within quotes.
        (quote_all if any("\r" in cell or cell != cell.strip() for cell in row) else minimal).writerow(row)
    return text.getvalue()
