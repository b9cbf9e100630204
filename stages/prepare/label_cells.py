"""Parse the label cells of a table: one label, several with a separator, or one 0/1 column per label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.tasks import SEPARATOR, written
from schemas.text import counted
from stages.prepare.error_text import listed

_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""Values of a 0/1 label column, in lower case."""

_MISSING = frozenset(
    {"nan", "-nan", "n/a", "#n/a", "#na", "<na>", "nat", "null", "-", "--", "?", ".", "1.#ind", "-1.#ind", "1.#qnan"}
    | {"-1.#qnan", "#ref!", "#value!", "#div/0!", "#name?", "#num!", "#null!"}
)
"""Spellings of a missing value by other programs, in lower case."""
_PERHAPS_MISSING = frozenset({"na", "none"})
"""Missing values for most programs, but class names in some data sets."""


def is_missing(cell: str) -> bool:
    """Whether a cell of a free-text column, such as the patient column, has no value."""
    return not cell or cell.casefold() in _MISSING | _PERHAPS_MISSING


def label_keys(data: DataSettings) -> dict[str, str]:
    """Return setting -> column, for all columns that labels are read from."""
    if data.label_columns is None:
        return {"data.label_column": data.label_column}
    return {f"data.label_columns.{number}": name for number, name in enumerate(data.label_columns)}


def join_labels(
    data: DataSettings, table: str, lines: Sequence[int], columns: Sequence[Sequence[str]]
) -> list[str | None]:
    """Combine the label cells of each row into one label in the notation of manifests.

    Args:
        data: Settings.
        table: File name for error messages.
        lines: Line number of each row.
        columns: Cells of each column of `label_keys`.

    Returns:
        Label of each row, or None if it is missing and `data.unlabelled` is allow. With a column per label, all of them
        have to be missing: of a row with some, neither a 0 nor leaving out the others would be right.

    Raises:
        DataError: A label is missing, a flag is neither 0 nor 1, or a label contains the separator of manifests.
    """
    labelled = [
        position for position in range(len(lines)) if not _is_unlabelled(data, [one[position] for one in columns])
    ]
    joined: list[str | None] = [None] * len(lines)
    found = _join([lines[at] for at in labelled], [[one[at] for at in labelled] for one in columns], data, table)
    for position, label in zip(labelled, found, strict=True):
        joined[position] = label
    return joined


def _is_unlabelled(data: DataSettings, cells: Sequence[str]) -> bool:
    """Whether a row has no label, and this is allowed. Labels that are listed in the settings are never missing."""
    if data.unlabelled == "error":
        return False
    if data.label_columns is not None:
        return all(map(is_missing, cells))
    if not cells[0]:
        # An image of a multi-label study may have none of the labels.
        return data.task != "multilabel"
    return is_missing(cells[0]) and cells[0] not in _class_words(data)


def _class_words(data: DataSettings) -> set[str]:
    return {*(data.classes or ()), *(data.class_names or {})}


def _join(lines: Sequence[int], columns: Sequence[Sequence[str]], data: DataSettings, table: str) -> list[str]:
    if data.task != "multilabel":
        _check_missing(data, table, lines, [[cell] for cell in columns[0]])
        return list(columns[0])
    if data.label_columns is None:
        labels = [{name.strip() for name in cell.split(data.label_separator)} - {""} for cell in columns[0]]
        _check_missing(data, table, lines, labels)
    else:
        flags = [_flags(table, name, lines, cells) for name, cells in zip(data.label_columns, columns, strict=True)]
        labels = [
            {name for name, flag in zip(data.label_columns, row, strict=True) if flag}
            for row in zip(*flags, strict=True)
        ]
    _check_names({name for names in labels for name in names} | set(data.label_columns or ()))
    # Sorted, so that equal label sets give equal strings.
    return [written(sorted(names)) for names in labels]


def _check_missing(data: DataSettings, table: str, lines: Sequence[int], rows: Iterable[Iterable[str]]) -> None:
    """Refuse missing labels in any spelling; the user has to list a class with such a name."""
    listed_names = _class_words(data)
    missing = [
        (line, label)
        for line, labels in zip(lines, rows, strict=True)
        for label in labels
        if is_missing(label) and label not in listed_names
    ]
    if missing:
        words = sorted({label for _, label in missing if label})
        hint = f" If a class has such a name, list it in data.classes: {', '.join(words)}." if words else ""
        raise DataError(
            f"{counted(len(missing), 'row')} of {table} {'has' if len(missing) == 1 else 'have'} no label.",
            listed(f"line {line}: {repr(label) if label else 'empty'}" for line, label in missing),
            "Fill in these labels, remove the rows, or set data.unlabelled: allow to cache and predict these images "
            f"without training on them.{hint}",
        )


def _flags(table: str, name: str, lines: Sequence[int], cells: Sequence[str]) -> list[bool]:
    invalid = [
        f"line {line}: {repr(cell) if cell else 'empty'}"
        for line, cell in zip(lines, cells, strict=True)
        if cell.lower() not in _FLAGS
    ]
    if invalid:
        raise DataError(
            f"{counted(len(invalid), 'cell')} of column {name!r} in {table} {'are' if len(invalid) > 1 else 'is'} "
            "neither 0 nor 1.",
            listed(invalid) + "\nIt is unknown whether these images have the label.",
            "Fill in 0 or 1, remove the rows, or leave the column out of data.label_columns. With data.unlabelled: "
            "allow, a row in which all of these cells are empty is an image without a label.",
        )
    return [_FLAGS[cell.lower()] for cell in cells]


def _check_names(names: set[str]) -> None:
    ambiguous = sorted(name for name in names if SEPARATOR in name)
    if ambiguous:
        raise DataError(
            f"{counted(len(ambiguous), 'label')} with {SEPARATOR!r} in the name.",
            listed(map(repr, ambiguous)) + "\nThis character separates labels in the manifest.",
            "Rename them, or set data.label_separator if it separates labels in the CSV.",
        )
