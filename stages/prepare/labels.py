"""Labels from the cells of a table: missing ones, several in one column with a separator, and columns of 0 and 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schemas.errors import DataError
from schemas.settings import DataSettings
from schemas.tasks import SEPARATOR, written
from schemas.text import counted
from stages.prepare.listing import listed

_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""What a cell of a label's own column may hold, in small letters."""

_MISSING = frozenset(
    {"nan", "-nan", "n/a", "#n/a", "#na", "<na>", "nat", "null", "-", "--", "?", ".", "1.#ind", "-1.#ind", "1.#qnan"}
    | {"-1.#qnan", "#ref!", "#value!", "#div/0!", "#name?", "#num!", "#null!"}
)
"""How programs write a missing value, in small letters."""
_PERHAPS_MISSING = frozenset({"na", "none"})
"""Missing values for most programs, but classes of some data sets."""


def is_missing(cell: str) -> bool:
    """Whether a cell of a column without fixed words, such as the patient's, holds no value."""
    return not cell or cell.casefold() in _MISSING | _PERHAPS_MISSING


def label_keys(data: DataSettings) -> dict[str, str]:
    """Setting -> column that the label is read from."""
    if data.label_columns is None:
        return {"data.label_column": data.label_column}
    return {f"data.label_columns.{number}": name for number, name in enumerate(data.label_columns)}


def join_labels(data: DataSettings, table: str, lines: Sequence[int], columns: Sequence[Sequence[str]]) -> list[str]:
    """What each row's cells say, as a manifest writes it.

    Args:
        data: Settings.
        table: Name of the file, for the message.
        lines: Line of each row.
        columns: Cells of each column of `label_keys`.

    Raises:
        DataError: A label is missing, a cell is neither 0 nor 1, or a label has the separator of manifests in it.
    """
    if data.task != "multilabel":
        _check_missing(data, table, lines, [[cell] for cell in columns[0]])
        return list(columns[0])
    if data.label_columns is None:
        found = [{name.strip() for name in cell.split(data.label_separator)} - {""} for cell in columns[0]]
        _check_missing(data, table, lines, found)
    else:
        flags = [_flags(table, name, lines, cells) for name, cells in zip(data.label_columns, columns, strict=True)]
        found = [
            {name for name, flag in zip(data.label_columns, row, strict=True) if flag}
            for row in zip(*flags, strict=True)
        ]
    _check_names({name for names in found for name in names} | set(data.label_columns or ()))
    # In one order, so that equal labels are equal text.
    return [written(sorted(names)) for names in found]


def _check_missing(data: DataSettings, table: str, lines: Sequence[int], rows: Iterable[Iterable[str]]) -> None:
    """Refuse missing labels, however they are spelled; a class of such a name has to be listed by the user."""
    listed_names = {*(data.classes or ()), *(data.class_names or {})}
    missing = [
        (line, label)
        for line, labels in zip(lines, rows, strict=True)
        for label in labels
        if is_missing(label) and label not in listed_names
    ]
    if missing:
        words = sorted({label for _, label in missing if label})
        hint = f" If a class is called so, list it in data.classes: {', '.join(words)}." if words else ""
        raise DataError(
            f"{counted(len(missing), 'row')} of {table} {'has' if len(missing) == 1 else 'have'} no label.",
            listed(f"line {line}: {repr(label) if label else 'empty'}" for line, label in missing),
            f"Fill in these labels or remove the rows.{hint}",
        )


def _flags(table: str, name: str, lines: Sequence[int], cells: Sequence[str]) -> list[bool]:
    strange = [
        f"line {line}: {repr(cell) if cell else 'empty'}"
        for line, cell in zip(lines, cells, strict=True)
        if cell.lower() not in _FLAGS
    ]
    if strange:
        raise DataError(
            f"{counted(len(strange), 'cell')} of column {name!r} in {table} {'are' if len(strange) > 1 else 'is'} "
            "neither 0 nor 1.",
            listed(strange) + "\nWhether these images have the label is not known, and no rule can decide it.",
            "Fill in 0 or 1, remove the rows, or leave the column out of data.label_columns.",
        )
    return [_FLAGS[cell.lower()] for cell in cells]


def _check_names(names: set[str]) -> None:
    strange = sorted(name for name in names if SEPARATOR in name)
    if strange:
        raise DataError(
            f"{counted(len(strange), 'label')} with {SEPARATOR!r} in the name.",
            listed(map(repr, strange)) + "\nThat sign stands between labels in the manifest.",
            "Rename them, or set data.label_separator if it stands between labels in the CSV.",
        )
