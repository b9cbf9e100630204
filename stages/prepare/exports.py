"""Write tables of `prepare`: the images that were set aside, and the splits for reuse in other studies."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from schemas.data_settings import TAGS, DataSettings
from schemas.errors import DataError
from schemas.manifest import UNLABELLED, Manifest, PrepareSummary
from stages.files import atomic_write, storage_errors
from stages.prepare.class_names import given_labels
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.table_columns import AUTO, FOLDER
from stages.tables import safe_cell

_MISSING = "NaN"
"""Label of an image without one: an empty cell of a multi-label study means that the image has none of the labels."""


def write_quarantine(
    set_aside: Sequence[tuple[LabelledImage, str]],
    items: Sequence[LabelledImage],
    failures: Mapping[str, str],
    path: Path,
) -> None:
    """Write path, label, group and reason of all images that were set aside.

    Args:
        set_aside: Stray images and empty class folders, with reasons.
        items: All other images.
        failures: Path -> reason, for images that cannot be used.
        path: File to write; removed if nothing was set aside.
    """
    excluded = [*set_aside, *((item, failures[item.path]) for item in items if item.path in failures)]
    if not excluded:
        # The file of an earlier run may list images that are in the manifest now.
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return
    rows = [[item.path, item.label, item.group or "", reason] for item, reason in excluded]
    _write(path, ["path", "label", "group", "reason"], rows)


def check_free(path: Path) -> None:
    """Refuse file names other than CSV, and existing files, to which rows may have been added.

    Raises:
        DataError: The file exists, or its name does not end in .csv.
    """
    if path.suffix.lower() != ".csv":
        raise DataError(
            f"{path} does not end in .csv.", "The splits are written as CSV.", "Choose a name that ends in .csv."
        )
    if os.path.lexists(path):
        raise DataError(f"{path} exists already.", "", "Choose another name, or remove the file.")


def write_splits(manifest: Manifest, summary: PrepareSummary, data: DataSettings, path: Path) -> None:
    """Write path, label, patient and split of each image to a table that can serve as `data.labels`.

    The column names are those of the settings, so that only `data.labels` has to change. Images of rows without a
    split, which users may add, get one by drawing; the others keep theirs.

    Raises:
        DataError: The file exists already.
        StorageError: The file cannot be written.
    """
    check_free(path)
    table_column = None if summary.group_column in (FOLDER, TAGS) else summary.group_column
    group_column = table_column or "patient" if data.group_column in (AUTO, TAGS) else data.group_column
    split_column = summary.split_column or (data.split_column if data.split_column not in (None, AUTO) else "split")
    columns = list(data.label_columns or (data.label_column,))
    rows = []
    for row in manifest.every():
        known = row.split != UNLABELLED
        labels = given_labels(row.label, data) if known else (_MISSING,)
        if data.label_columns is None:
            cells = [data.label_separator.join(labels)]
        else:
            cells = [str(int(name in labels)) if known else "" for name in data.label_columns]
        group = [] if group_column is None else ["" if row.group == row.path else row.group]
        rows.append([row.path, *cells, *group, row.split if known else ""])
    groups = [] if group_column is None else [group_column]
    _write(path, [data.path_column, *columns, *groups, split_column or "split"], rows)


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    # Leading and trailing blanks are part of a name only within quotes.
    blanks = any(cell != cell.strip() for row in rows for cell in row)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if blanks else csv.QUOTE_MINIMAL)
    writer.writerow(header)
    writer.writerows(map(safe_cell, row) for row in rows)
    atomic_write(path, text.getvalue().encode())
