"""Print messages to stderr and results to stdout, with control characters escaped."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from pipeline.terminal_tables import pairs as pairs_table
from pipeline.terminal_tables import tables
from schemas.text import json_visible, shortened, visible
from stages.ranks import Ranks

MAX_MODEL_COLUMNS = 8
"""Number of models above which a table has a row per model instead of a column."""

P = ParamSpec("P")
T = TypeVar("T")

LAYOUT = "\n\t"
"""Control characters that messages of this program contain."""


class SafeConsole(Console):
    """A console that prints file names, labels and settings without executing control sequences in them.

    Rich removes some control characters silently and passes on others, such as ESC. The functions of this module escape
    text before layout; this class covers all other output, such as progress bars.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = True) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape the text of each segment, except control segments of Rich itself (cursor, clear)."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, LAYOUT))


def make_encodable() -> None:
    """Escape characters that the encoding of stdout or stderr lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


def stderr_console() -> Console:
    """Return a console for messages on stderr, so that a pipe receives only results."""
    return SafeConsole(stderr=True)


_receiver: ContextVar[Callable[[str], None] | None] = ContextVar("receiver", default=None)
"""Receives the lines of `say`; None: they are printed on stderr."""


@contextmanager
def notices_to(receive: Callable[[str], None]) -> Iterator[None]:
    """Send the lines of `say` to a function within the block; an outer block takes precedence."""
    if _receiver.get() is not None:
        yield
        return
    token = _receiver.set(receive)
    try:
        yield
    finally:
        _receiver.reset(token)


def quiet(function: Callable[P, T]) -> Callable[P, T]:
    """Send what a function reports with `say` to the logger `fpt`, unless the command line shows it."""

    @wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> T:
        with notices_to(logging.getLogger("fpt").info):
            return function(*args, **keywords)

    return run


def print_notice(message: str) -> None:
    """Print one line on stderr, without markup."""
    stderr_console().print(visible(message, LAYOUT))


def say(message: str) -> None:
    """Print a message for the user, only on rank 0 in distributed training."""
    if Ranks.of().first:
        (_receiver.get() or print_notice)(message)


def print_error(message: str) -> None:
    """Print an error on stderr, omitting the middle of very long lines."""
    stderr_console().print("\n".join(shortened(visible(line, LAYOUT)) for line in message.split("\n")))


def say_next(command: str) -> None:
    """Print the next command, except within `dvc repro`, which starts the next stage itself."""
    if "DVC_STAGE" not in os.environ:
        say(f"Next: {command}")


def show(message: str) -> None:
    """Print a line of the result on stdout."""
    SafeConsole().print(visible(message, LAYOUT))


def show_json(value: Mapping[str, Any]) -> None:
    """Print the result as JSON on stdout, for machines."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    show(json_visible(json.dumps(value, indent=2, ensure_ascii=not unicode)))


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print the result as named values, one per line."""
    show(title)
    _print(pairs_table([(_cell(name), _cell(value)) for name, value in pairs], Console().width))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> None:
    """Print a table on stdout, continued in further tables if not all columns fit.

    Args:
        title: Line above the table.
        columns: Column names.
        rows: Cells, text without markup.
        words: Whether cells are words, aligned left, instead of numbers, aligned right.
    """
    show(title)
    cells = [[_cell(cell) for cell in row] for row in (columns, *rows)]
    for table in tables(cells[0], cells[1:], Console().width, words=words):
        _print(table)


def show_models(title: str, head: str, names: Sequence[str], values: Mapping[str, Sequence[str]]) -> None:
    """Print a table with a row per metric and a column per model, or transposed for many models.

    Args:
        title: Line above the table.
        head: Header of the model names, such as "settings".
        names: Model names.
        values: Metric -> value of each model.
    """
    if len(names) > MAX_MODEL_COLUMNS:
        rows = [[name, *(row[at] for row in values.values())] for at, name in enumerate(names)]
        show_table(title, [head, *values], rows)
    else:
        show_table(title, [head, *names], [[metric, *row] for metric, row in values.items()])


def _print(table: Table) -> None:
    console = SafeConsole(soft_wrap=False)
    # If the terminal is too narrow for a single column, print a wider table rather than break numbers.
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    if needed > console.width:
        console.width = needed
    console.print(table)


def _cell(text: str) -> str:
    return visible(text, "\n")


def show_sizes(by_dtype: Mapping[str, int], chosen: str) -> None:
    """Print the cache size per image for each dtype of the features."""
    rows = [
        (name + (" (chosen)" if name == chosen else ""), f"{count:,}", f"{by_dtype['float32'] / count:.1f}x")
        for name, count in by_dtype.items()
    ]
    show_table("Cache for each features.dtype", ("dtype", "bytes per image", "smaller"), rows)


# dask.utils.format_bytes and format_time do not replace the next two functions: importing dask.utils would add 0.1 s to
# the start of every command, and they print 999 bytes as "0.98 kiB" and 3 s as "3.00 s".
def size(count: float) -> str:
    """Format a number of bytes: `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Format a duration: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def score(value: float | None) -> str:
    """Format a metric with three digits, or as a dash if undefined."""
    return "-" if value is None else f"{value:.3f}"
