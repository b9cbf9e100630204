"""Tables that `prepare` writes: what was set aside, and the splits as a table that can grow."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from schemas.errors import DataError
from schemas.manifest import Manifest, PrepareSummary
from schemas.settings import DataSettings
from stages.files import atomic_write, storage_errors
from stages.prepare.class_names import given_labels
from stages.prepare.columns import AUTO, FOLDER
from stages.prepare.scan import Item
from stages.tables import safe_cell


def write_quarantine(
    set_aside: Sequence[tuple[Item, str]], items: Sequence[Item], failures: Mapping[str, str], path: Path
) -> None:
    """Write path, label, group and reason of everything that was set aside.

    Args:
        set_aside: Stray images and empty class folders, with their reasons.
        items: All other images.
        failures: Path -> reason, of those that cannot be used.
        path: File to write; removed where nothing was set aside.
    """
    aside = [*set_aside, *((item, failures[item.path]) for item in items if item.path in failures)]
    if not aside:
        # A file of an earlier run would accuse images that are in the manifest now.
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return
    rows = [[item.path, item.label, item.group or "", reason] for item, reason in aside]
    _write(path, ["path", "label", "group", "reason"], rows)


def check_free(path: Path) -> None:
    """Refuse another kind of table than CSV, and to overwrite one: rows may have been added to it.

    Raises:
        DataError: The file is there, or its name is not that of a CSV.
    """
    if path.suffix.lower() != ".csv":
        raise DataError(
            f"{path} is not named as CSV, which is what is written.", "", "Choose a name that ends in .csv."
        )
    if os.path.lexists(path):
        raise DataError(f"{path} is there already.", "", "Choose another name, or remove it first.")


def write_splits(manifest: Manifest, summary: PrepareSummary, data: DataSettings, path: Path) -> None:
    """Write path, label, patient and split of each image as a table that `data.labels` can name.

    Its columns are those that the settings name, so that nothing but `data.labels` has to change. Rows that are added
    without a split have it drawn; the others keep theirs.

    Raises:
        DataError: The file is there already.
        StorageError: It cannot be written.
    """
    check_free(path)
    known_groups = None if summary.group_column == FOLDER else summary.group_column
    group_column = known_groups or "patient" if data.group_column == AUTO else data.group_column
    split_column = summary.split_column or (data.split_column if data.split_column not in (None, AUTO) else "split")
    columns = list(data.label_columns or (data.label_column,))
    rows = []
    for row in manifest.rows:
        labels = given_labels(row.label, data)
        if data.label_columns is None:
            cells = [data.label_separator.join(labels)]
        else:
            cells = [str(int(name in labels)) for name in data.label_columns]
        group = [] if group_column is None else ["" if row.group == row.path else row.group]
        rows.append([row.path, *cells, *group, row.split])
    groups = [] if group_column is None else [group_column]
    _write(path, [data.path_column, *columns, *groups, split_column or "split"], rows)


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    # Outer blanks belong to a name only within quotes.
    blanks = any(cell != cell.strip() for row in rows for cell in row)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if blanks else csv.QUOTE_MINIMAL)
    writer.writerow(header)
    writer.writerows(map(safe_cell, row) for row in rows)
    atomic_write(path, text.getvalue().encode())
