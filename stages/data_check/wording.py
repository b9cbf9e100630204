"""Put a check into words and tables, for the terminal and for the HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from schemas.data_check import Copies, DataCheck
from schemas.text import counted, images_of

_SIZES = 10
"""Sizes that the table shows."""


@dataclass(frozen=True)
class Finding:
    """Something that the user should look at."""

    title: str
    """What was found, with its number."""
    meaning: str
    """Why it matters and what to do."""
    lines: tuple[str, ...]
    """All cases."""
    serious: bool = True
    """Whether results would be wrong."""


@dataclass(frozen=True)
class CountTable:
    """A table of numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def headline(check: DataCheck) -> str:
    """Return the number of images, groups and classes."""
    without = f"; {counted(check.unlabelled, 'image')} without a label" if check.unlabelled else ""
    return f"{images_of(check.images, check.groups, check.unit)}, {counted(len(check.classes), 'class')}{without}"


def findings(check: DataCheck) -> list[Finding]:
    """Return what was found, the most serious first; nothing for what is in order."""
    return [finding for finding in (*_serious(check), *_notable(check)) if finding is not None]


def _serious(check: DataCheck) -> list[Finding | None]:
    unusable = [f"{path}: {reason}" for path, reason in check.unreadable.items()] + list(check.problems)
    suspected = [
        f"{probe.name}: balanced accuracy {probe.accuracy:.2f}, by chance {probe.chance[1]:.2f} to "
        f"{probe.chance[2]:.2f}"
        for probe in check.probes
        if probe.suspected
    ]
    return [
        _finding(
            check.leaks,
            "leak",
            " between splits",
            "A model would be evaluated on images or patients that it was trained on. `fpt data repair` writes a "
            "table without them.",
        ),
        _finding(unusable, "image", " that cannot be used", "Repair, move or remove them; prepare stops at them."),
        _finding(
            map(_copies, check.conflicts),
            "copy",
            " with different labels",
            "At least one label of each is wrong: look at the images.",
        ),
        _finding(
            suspected,
            "suspected shortcut",
            "",
            "Each of these predicts the class of unseen patients better than chance. If it is not part of the finding, "
            "a model may learn how the images were acquired: compare images of one site, scanner and format.",
        ),
        _finding(
            [f"{path}: {warning}" for path, warning in check.corrupt.items()],
            "image",
            " with corrupt data",
            "The decoder accepts them with a warning (data.on_warning).",
        ),
        _finding(check.blank, "blank image", "", "All pixels have nearly the same value."),
    ]


def _notable(check: DataCheck) -> list[Finding | None]:
    return [
        _finding(check.tiny, "tiny image", "", "The LPM sees them enlarged by more than four.", serious=False),
        _finding(
            map(_copies, check.duplicates),
            "duplicate",
            " (identical files)",
            "Drawn splits keep them together; each counts as an image.",
            serious=False,
        ),
        _finding(
            map(_copies, check.near), "near-duplicate pair", "", "Drawn splits keep them together.", serious=False
        ),
        _finding(
            map(_copies, check.similar_features or ()),
            "pair",
            " with similar features",
            "The LPM gives them nearly the same features: look whether they show the same patient.",
            serious=False,
        ),
        _finding(check.skipped, "kind", " of skipped files", "They are not read as images.", serious=False),
    ]


def count_tables(check: DataCheck) -> list[CountTable]:
    """Return the tables: classes, probes, sizes, and a table for each column with few values."""
    columns = list(next(iter(check.by_class.values()), {}))
    rows = [(name or "no label", *(f"{column[key]:,}" for key in columns)) for name, column in check.by_class.items()]
    tables = [CountTable("Classes", ("class", *columns), tuple(rows))]
    if check.probes:
        tables.append(
            CountTable(
                "What predicts the class apart from the finding",
                ("property", "balanced accuracy", "by chance (99% interval)"),
                tuple(
                    (
                        probe.name,
                        f"{probe.accuracy:.2f}{' (suspected)' if probe.suspected else ''}",
                        f"{probe.chance[0]:.2f} ({probe.chance[1]:.2f} to {probe.chance[2]:.2f})",
                    )
                    for probe in check.probes
                ),
                "Every image is predicted by its 9 nearest neighbours of other patients, or by the images with the "
                "same value in a column. Chance: labels permuted between patients.",
            )
        )
    sizes = list(check.sizes.items())
    shown = [(size, f"{number:,}") for size, number in sizes[:_SIZES]]
    if len(sizes) > _SIZES:
        shown.append((f"{len(sizes) - _SIZES:,} other sizes", f"{sum(number for _, number in sizes[_SIZES:]):,}"))
    tables.append(CountTable("Sizes in pixels", ("width x height", "images"), tuple(shown)))
    for name, values in check.columns.items():
        by_value = tuple(
            (value or "empty", *(f"{counts.get(label, 0):,}" for label in check.classes))
            for value, counts in values.items()
        )
        if len(values) > 1:
            tables.append(CountTable(f"Classes by {name}", (name, *check.classes), by_value))
    same = tuple(
        (name, value or "empty") for name, values in check.columns.items() for value in values if len(values) == 1
    )
    return [*tables, CountTable("The same for all images", ("property", "value"), same)] if same else tables


def _finding(lines: Iterable[str], noun: str, rest: str, meaning: str, *, serious: bool = True) -> Finding | None:
    every: Sequence[str] = tuple(lines)
    return Finding(f"{counted(len(every), noun)}{rest}", meaning, tuple(every), serious) if every else None


def _copies(copies: Copies) -> str:
    names = (
        (f"{path} ({label})" for path, label in zip(copies.paths, copies.labels, strict=True))
        if copies.conflict
        else copies.paths
    )
    likeness = "" if copies.similarity == 1.0 else f": {copies.similarity:.2f}"
    return " = ".join(names) + likeness
