"""Tables for terminals of any width: a number is never broken or cut off.

Names may go on in the next line of their cell, and columns that do not fit form a further table below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

LONGEST_PART = 12
"""Cells of a line into which a name may be broken, where the terminal has no room for all of it."""

_EDGE, _PADDING = 1, 3
"""Cells that a table takes at its left edge, and beside each column."""

_PART = re.compile(
    r"""
    \s+
    | [(\[<>=~]?                                        # such as the bracket before a number
      [+-]?\d+(?:[.,:]\d+)*(?:[eE][+-]?\d+)?            # a number, a time, or a version
      [^\s\w/|]{0,3}                                    # such as the percent sign or bracket behind it
    | [^\W\d]+ [^\s\w]?                                 # a word with what follows it
    | [^\s\w]{1,3}                                      # such as a dash in place of a number
    | [\w\W]
    """,
    re.VERBOSE,
)


def tables(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, words: bool = False
) -> Iterator[Table]:
    """Lay out a table, as several where its columns do not fit side by side.

    Args:
        columns: Headers; the first column names the rows, and starts each of the tables.
        rows: Cells without markup, one for each column.
        width: Of the terminal.
        words: Whether the other columns hold text, too: then there is one table, whose text is broken to fit.
    """
    texts = [[columns[at], *(row[at] for row in rows)] for at in range(len(columns))]
    if words:
        widths = _shrunk([_natural(text) for text in texts], [_least(text) for text in texts], width)
        yield _table(texts, widths, range(len(columns)), words=True)
        return
    widths = _fitted(texts, width)
    room = width - _EDGE - widths[0] - _PADDING
    page: list[int] = []
    for at in range(1, len(columns)):
        if page and sum(widths[one] + _PADDING for one in (*page, at)) > room:
            yield _table(texts, widths, [0, *page])
            page = []
        page.append(at)
    yield _table(texts, widths, [0, *page])


def pairs(rows: Sequence[tuple[str, str]], width: int) -> Table:
    """Lay out named values, one per line, without a frame."""
    texts = [[row[at] for row in rows] for at in range(2)]
    widths = _shrunk([_natural(text) for text in texts], [_least(text) for text in texts], width + 3)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", width=widths[0], no_wrap=True)
    table.add_column(width=widths[1], no_wrap=True)
    for row in rows:
        table.add_row(*(Text(fold(cell, size)) for cell, size in zip(row, widths, strict=True)))
    return table


def fold(text: str, width: int) -> str:
    """Break a text into lines of at most `width` cells, never within a number that fits into a line."""
    lines, line = [], ""
    for part in _PART.findall(text):
        while cell_len(line) + cell_len(part.rstrip()) > width:
            if line.strip():
                lines.append(line.rstrip())
                line, part = "", part.lstrip()
            else:
                piece = _start(part, width)
                lines.append(piece)
                line, part = "", part[len(piece) :]
        line += part
    return "\n".join([*lines, line.rstrip()] if line.strip() or not lines else lines)


def _start(text: str, width: int) -> str:
    """As many characters as fit, at least one."""
    end = 1
    while end < len(text) and cell_len(text[: end + 1]) <= width:
        end += 1
    return text[:end]


def _natural(cells: Sequence[str]) -> int:
    """Width of the longest cell."""
    return max((cell_len(cell) for cell in cells), default=0)


def _least(cells: Sequence[str]) -> int:
    """Width under which a number would be broken, or a word into small pieces."""
    parts = [(part.strip(), any(map(str.isdigit, part))) for cell in cells for part in _PART.findall(cell)]
    return max((cell_len(part) if number else min(LONGEST_PART, cell_len(part)) for part, number in parts), default=1)


def _fitted(texts: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of the columns; where not all fit in full, headers are broken, then names and the widest cells."""
    full = [_natural(text) for text in texts]
    if sum(full) + _PADDING * len(full) + _EDGE <= width:
        return full
    sizes = [max(_natural(text[1:]), min(_natural(text[:1]), max(LONGEST_PART, _least(text[:1])))) for text in texts]
    room = width - _EDGE - 2 * _PADDING
    first = max(_least(texts[0]), min(full[0], max(room - max(sizes[1:], default=0), width // 4)))
    others = zip(sizes[1:], texts[1:], strict=True)
    return [first, *(min(size, max(_least(text), room - first)) for size, text in others)]


def _shrunk(widths: list[int], least: list[int], width: int) -> list[int]:
    """Take from the widest column until all fit, from none more than it can give."""
    found = list(widths)
    while sum(found) + _PADDING * len(found) + _EDGE > width:
        give = [at for at in range(len(found)) if found[at] > least[at]]
        if not give:
            break
        found[max(give, key=lambda at: found[at])] -= 1
    return found


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
