"""Where words go: progress and talk to stderr, results to stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.ranks import Ranks


def talk() -> Console:
    """The console for people: stderr, so that a pipe gets results alone."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line for people, without markup; of several processes that train together, the first one speaks."""
    if Ranks.of().first:
        talk().print(message, markup=False)


def say_next(command: str) -> None:
    """The next command, for who runs the verbs by hand; inside `dvc repro` the next stage starts by itself."""
    if "DVC_STAGE" not in os.environ:
        say(f"Next: {command}")


def show(message: str) -> None:
    """One line of the result, on stdout."""
    Console(highlight=False, soft_wrap=True).print(message, markup=False)


def show_json(value: Mapping[str, Any]) -> None:
    """The result for machines: JSON alone on stdout."""
    show(json.dumps(value, indent=2, ensure_ascii=False))


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """The result for people: one named value a line."""
    show(title)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in pairs:
        table.add_row(name, value)
    Console(highlight=False).print(table)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> None:
    """A table on stdout: names on the left, numbers on the right.

    Args:
        title: Line above it.
        columns: Names.
        rows: Of text without markup.
        words: Whether it holds words instead of numbers, which start on the left.
    """
    show(title)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if words or index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


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
