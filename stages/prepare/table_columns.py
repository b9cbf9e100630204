"""Detect the columns with patients and predefined splits by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import GroupUnit, Split
from stages.prepare.error_text import listed

AUTO = "auto"
FOLDER = "folder"
"""Value of `data.group_column` that makes sub-folders of class folders the groups."""

_GROUP_NAMES = frozenset({"patient", "patientid", "subject", "subjectid", "case", "caseid", "group", "groupid"})
_SPLIT_NAMES = frozenset({"split"})
_PERSON = ("patient", "subject", "case", "person", "participant")

SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Accepted spelling of a split, in lower case -> split."""


def split_of_word(word: str) -> Split | None:
    """Return the split that a word names, ignoring case, or None."""
    return SPLIT_WORDS.get(word.strip().casefold())


def unit_of_column(name: str) -> GroupUnit:
    """Derive the kind of the groups from the name of their column."""
    return "patients" if _plain(name).startswith(_PERSON) else "groups"


def find_columns(
    data: DataSettings, table: str, header: Sequence[str], taken: Sequence[str]
) -> tuple[str | None, str | None, list[str]]:
    """Resolve `data.group_column` and `data.split_column` against a header.

    Args:
        data: Settings.
        table: File name for messages.
        header: All column names.
        taken: Columns with another role: paths and labels.

    Returns:
        Column with the groups, column with the splits, and notes for the user.

    Raises:
        DataError: Several columns match.
    """
    free = [name for name in header if name not in taken]
    notes: list[str] = []
    split = _find(data.split_column, "split_column", table, free, _SPLIT_NAMES)
    group = _find(data.group_column, "group_column", table, [name for name in free if name != split], _GROUP_NAMES)
    if group is not None and data.group_column == AUTO:
        noun = "patient" if unit_of_column(group) == "patients" else "group"
        notes.append(
            f"Column {group!r} of {table} has the {noun} of each image: all images of a {noun} stay in one split."
        )
    if split is not None and data.split_column == AUTO:
        notes.append(f"Column {split!r} of {table} has the split of each image.")
    unused = [name for name in free if _plain(name) in _GROUP_NAMES]
    if data.group_column is None and unused:
        notes.append(
            f"Column {unused[0]!r} of {table} is not used (data.group_column: null): images of one patient may be in "
            "different splits."
        )
    return group, split, notes


def _find(named: str | None, key: str, table: str, free: Sequence[str], names: frozenset[str]) -> str | None:
    if named != AUTO:
        return named
    candidates = [name for name in free if _plain(name) in names]
    if len(candidates) > 1:
        raise DataError(
            f"Several columns of {table} match data.{key}: auto.",
            listed(map(repr, candidates)),
            f"Name one of them with data.{key} in params.yaml, or set it to none.",
        )
    return candidates[0] if candidates else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_.\-]+", "", name).casefold()
