"""Lay out tables for terminals of any width without breaking or truncating a number.

Long names are wrapped within their cell, and columns that do not fit form a further table below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

MIN_NAME_WIDTH = 12
"""Width to which a column of names may shrink, in terminal cells, breaking longer words."""

_EDGE, _PADDING = 1, 3
"""Terminal cells that a table uses at its left edge and around each column."""

_TOKEN = re.compile(
    r"""
    \s+
    | [(\[<>=~]?                                        # a sign before a number, such as a bracket
      [+-]?\d+(?:[.,:]\d+)*(?:[eE][+-]?\d+)?            # a number, a time, or a version
      [^\s\w/|]{0,3}                                    # and after it, such as a percent sign
    | [^\W\d]+ [^\s\w]?                                 # a word and the character after it
    | [^\s\w]{1,3}                                      # symbols, such as a dash in place of a number
    | [\w\W]
    """,
    re.VERBOSE,
)


def tables(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, words: bool = False
) -> Iterator[Table]:
    """Lay out a table, split into several if its columns do not fit side by side.

    Args:
        columns: Headers; the first column has the row names and is repeated in each table.
        rows: Cells without markup, one for each column.
        width: Width of the terminal in cells.
        words: Whether the other columns are text, too; then the text is wrapped to fit into a single table.
    """
    texts = [[columns[at], *(row[at] for row in rows)] for at in range(len(columns))]
    if words:
        widths = _shrunk([_full_width(text) for text in texts], [_min_width(text) for text in texts], width)
        yield _table(texts, widths, range(len(columns)), words=True)
        return
    widths = _fitted(texts, width)
    room = width - _EDGE - widths[0] - _PADDING
    page: list[int] = []
    for at in range(1, len(columns)):
        if page and sum(widths[column] + _PADDING for column in (*page, at)) > room:
            yield _table(texts, widths, [0, *page])
            page = []
        page.append(at)
    yield _table(texts, widths, [0, *page])


def pairs(rows: Sequence[tuple[str, str]], width: int) -> Table:
    """Lay out named values, one per line, without a frame."""
    texts = [[row[at] for row in rows] for at in range(2)]
    widths = _shrunk([_full_width(text) for text in texts], [_min_width(text) for text in texts], width + 3)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", width=widths[0], no_wrap=True)
    table.add_column(width=widths[1], no_wrap=True)
    for row in rows:
        table.add_row(*(Text(fold(cell, size)) for cell, size in zip(row, widths, strict=True)))
    return table


def fold(text: str, width: int) -> str:
    """Wrap a text into lines of at most `width` cells, without breaking a number that fits into a line."""
    lines, line = [], ""
    for token in _TOKEN.findall(text):
        while cell_len(line) + cell_len(token.rstrip()) > width:
            if line.strip():
                lines.append(line.rstrip())
                line, token = "", token.lstrip()
            else:
                piece = _prefix(token, width)
                lines.append(piece)
                line, token = "", token[len(piece) :]
        line += token
    return "\n".join([*lines, line.rstrip()] if line.strip() or not lines else lines)


def _prefix(text: str, width: int) -> str:
    """Return as many characters as fit, at least one."""
    end = 1
    while end < len(text) and cell_len(text[: end + 1]) <= width:
        end += 1
    return text[:end]


def _full_width(cells: Sequence[str]) -> int:
    """Return the width of the longest cell."""
    return max((cell_len(cell) for cell in cells), default=0)


def _min_width(cells: Sequence[str]) -> int:
    """Return the smallest width that breaks no number and no word of up to `MIN_NAME_WIDTH`."""
    tokens = [(token.strip(), any(map(str.isdigit, token))) for cell in cells for token in _TOKEN.findall(cell)]
    widths = (cell_len(token) if number else min(MIN_NAME_WIDTH, cell_len(token)) for token, number in tokens)
    return max(widths, default=1)


def _fitted(texts: Sequence[Sequence[str]], width: int) -> list[int]:
    """Compute column widths; if not all fit, wrap headers first, then names and the widest cells."""
    full = [_full_width(text) for text in texts]
    if sum(full) + _PADDING * len(full) + _EDGE <= width:
        return full
    sizes = [
        max(_full_width(text[1:]), min(_full_width(text[:1]), max(MIN_NAME_WIDTH, _min_width(text[:1]))))
        for text in texts
    ]
    room = width - _EDGE - 2 * _PADDING
    first = max(_min_width(texts[0]), min(full[0], max(room - max(sizes[1:], default=0), width // 4)))
    others = zip(sizes[1:], texts[1:], strict=True)
    return [first, *(min(size, max(_min_width(text), room - first)) for size, text in others)]


def _shrunk(widths: list[int], minimum: list[int], width: int) -> list[int]:
    """Shrink the widest column step by step until all fit, and none below its minimum."""
    shrunk = list(widths)
    while sum(shrunk) + _PADDING * len(shrunk) + _EDGE > width:
        shrinkable = [at for at in range(len(shrunk)) if shrunk[at] > minimum[at]]
        if not shrinkable:
            break
        shrunk[max(shrinkable, key=lambda at: shrunk[at])] -= 1
    return shrunk


def _table(
    texts: Sequence[Sequence[str]], widths: Sequence[int], chosen: Sequence[int], *, words: bool = False
) -> Table:
    table = Table()
    for at in chosen:
        justify = "left" if words or at == 0 else "right"
        header = Text(fold(texts[at][0], widths[at]))
        table.add_column(header, justify=justify, width=widths[at], no_wrap=True)  # type: ignore[arg-type]
    for row in range(1, len(texts[0])):
        table.add_row(*(Text(fold(texts[at][row], widths[at])) for at in chosen))
    return table
