"""Output: progress and messages to stderr, results to stdout, nothing that a terminal would obey."""

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

from pipeline.tables import pairs as pairs_table
from pipeline.tables import tables
from schemas.text import json_visible, shortened, visible
from stages.ranks import Ranks

MOST_COLUMNS = 8
"""Models beyond which a table has a row per model."""

P = ParamSpec("P")
T = TypeVar("T")

LAYOUT = "\n\t"
"""Control characters that our own messages contain."""


class SafeConsole(Console):
    """A console whose text cannot steer the terminal, whatever file names, labels and settings hold.

    Rich drops some control characters silently and passes others on, ESC among them. Text is escaped before it is
    laid out wherever this module prints it; this catches what comes another way, such as a progress bar.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = True) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape the text of each segment; control segments are Rich's own (cursor, clear)."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, LAYOUT))


def make_encodable() -> None:
    """Escape characters that the encoding of stdout or stderr lacks, instead of stopping at them."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


def talk() -> Console:
    """The console for people: stderr, so that a pipe receives only results."""
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
    talk().print(visible(message, LAYOUT))


def say(message: str) -> None:
    """Print one line for people, without markup; of several processes that train together, only rank 0."""
    if Ranks.of().first:
        (_receiver.get() or print_notice)(message)


def complain(message: str) -> None:
    """Print an error on stderr; the middle of very long lines is left out."""
    talk().print("\n".join(shortened(visible(line, LAYOUT)) for line in message.split("\n")))


def say_next(command: str) -> None:
    """The next command, for who runs the verbs by hand; inside `dvc repro` the next stage starts by itself."""
    if "DVC_STAGE" not in os.environ:
        say(f"Next: {command}")


def show(message: str) -> None:
    """One line of the result, on stdout."""
    SafeConsole().print(visible(message, LAYOUT))


def show_json(value: Mapping[str, Any]) -> None:
    """The result for machines: only JSON on stdout."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    show(json_visible(json.dumps(value, indent=2, ensure_ascii=not unicode)))


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """The result for people: one named value a line."""
    show(title)
    _print(pairs_table([(_cell(name), _cell(value)) for name, value in pairs], Console().width))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> None:
    """A table on stdout: names on the left, numbers on the right; more columns than fit go into further tables.

    Args:
        title: Line above it.
        columns: Names.
        rows: Of text without markup.
        words: Whether it holds words instead of numbers, which start on the left.
    """
    show(title)
    cells = [[_cell(cell) for cell in row] for row in (columns, *rows)]
    for table in tables(cells[0], cells[1:], Console().width, words=words):
        _print(table)


def show_models(title: str, head: str, names: Sequence[str], values: Mapping[str, Sequence[str]]) -> None:
    """A table that compares models: a row per metric and a column per model, turned round where there are many models.

    Args:
        title: Line above it.
        head: What `names` are, such as "settings".
        names: Of the models.
        values: Metric -> value of each model.
    """
    if len(names) > MOST_COLUMNS:
        rows = [[name, *(row[at] for row in values.values())] for at, name in enumerate(names)]
        show_table(title, [head, *values], rows)
    else:
        show_table(title, [head, *names], [[metric, *row] for metric, row in values.items()])


def _print(table: Table) -> None:
    console = SafeConsole(soft_wrap=False)
    # Wider than the terminal rather than with broken numbers, where the terminal is too narrow for a single column.
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    if needed > console.width:
        console.width = needed
    console.print(table)


def _cell(text: str) -> str:
    return visible(text, "\n")


def show_sizes(by_dtype: Mapping[str, int], chosen: str) -> None:
    """Bytes of an image in the cache for each type of its features."""
    rows = [
        (name + (" (chosen)" if name == chosen else ""), f"{count:,}", f"{by_dtype['float32'] / count:.1f}x")
        for name, count in by_dtype.items()
    ]
    show_table("Cache for each features.dtype", ("dtype", "bytes an image", "smaller"), rows)


def size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def score(value: float | None) -> str:
    """A metric with three digits; a dash where it is not defined."""
    return "-" if value is None else f"{value:.3f}"
