"""Where words go: progress and talk to stderr, results to stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.tables import pairs as pairs_table
from pipeline.tables import tables
from stages.ranks import Ranks

MOST_COLUMNS = 8
"""Models beyond which a table has a row per model."""


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
    _print(pairs_table(pairs, Console().width))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> None:
    """A table on stdout: names on the left, numbers on the right; more columns than fit go into further tables.

    Args:
        title: Line above it.
        columns: Names.
        rows: Of text without markup.
        words: Whether it holds words instead of numbers, which start on the left.
    """
    show(title)
    for table in tables(columns, rows, Console().width, words=words):
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
    console = Console(highlight=False)
    # Wider than the terminal rather than with broken numbers, where the terminal is too narrow for a single column.
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(highlight=False, width=max(console.width, needed)).print(table)


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
