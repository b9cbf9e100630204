"""Write a table without the images of train and val that leak into a split that is evaluated."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from schemas.data_check import Copies, DroppedImage, Repair
from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import SPLITS, Split
from schemas.tasks import names_in
from stages.data_check.check import ReadData, find_copies
from stages.files import atomic_write
from stages.groups import Cluster, find_clusters
from stages.prepare.dataset_listing import Listing
from stages.prepare.exports import check_free
from stages.prepare.image_digests import Digests
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.leaks import find_leaks
from stages.prepare.table_cells import read_cells, written_cells
from stages.tables import csv_text, safe_cell

_KEPT_FIRST: tuple[Split, ...] = ("test", "val", "train")
"""Of the splits that images which belong together are in, the first one keeps them."""


def plan_repair(read: ReadData) -> Repair:
    """Choose the images to leave out, so that no content, group or near-duplicate is in two splits.

    Of images that belong together (`stages.groups`), those of test stay, else those of val. Images without a given
    split stay: their split is drawn. Nothing that `data.allow_leaks` lists counts as a leak.

    Args:
        read: The data set with its given splits.

    Raises:
        DataError: No split is given, so that nothing can leak; or rows of the table are not single images.
    """
    data, listing, digests = read.data, read.listing, read.digests
    if data.split_files is not None:
        raise DataError(
            "The splits are those of the lists of data.split_files.",
            "A table without images that they list would not fit them.",
            "Remove the images that leak from the lists; `fpt data check` prints them.",
        )
    if data.tag_columns is not None:
        raise DataError(
            "The table has a row for all files with the same elements of the header (data.tag_columns).",
            "Leaving out an image would leave out all images of its row.",
            "Correct the splits of the table, or set data.split_column: null: drawn splits do not leak.",
        )
    if all(item.split is None for item in listing.items):
        raise DataError(
            "There is nothing to repair: no split is given.",
            "Drawn splits keep copies, near-duplicates and images of one patient together.",
            "Run `fpt prepare`.",
        )
    dropped = _dropped(read)
    gone = {image.path for image in dropped}
    items = [item for item in listing.items if item.path not in gone]
    return Repair(
        rows=len(items) + len(listing.unlabelled),
        dropped=dropped,
        conflicts=_conflicts(data, listing, digests, items),
        missing=tuple(_missing(data, items, read.classes)),
    )


def write_repair(repair: Repair, read: ReadData, root: Path, output: Path, report: Path) -> None:
    """Write the table without the dropped images, and a table of these. The user's table stays as it is.

    The new table has the columns, cells and order of rows of the old one, as CSV.

    Raises:
        DataError: One of the files exists already, or the table changed meanwhile.
        StorageError: A file cannot be written.
    """
    for path in (output, report):
        check_free(path)
    data = read.data
    table = root / Path(data.labels_file or "").expanduser()
    gone = {image.path for image in repair.dropped}
    lines = {item.line for item in read.listing.items if item.path in gone}
    header, rows = read_cells(table, (data.path_column,))
    left = [cells for line, cells in rows if line not in lines]
    if len(left) != repair.rows:
        raise DataError(f"{table} changed while it was repaired.", "", "Run the command again.")
    atomic_write(output, csv_text(written_cells(table, header, left)).encode())
    fields = list(DroppedImage.model_fields)
    reasons = [[safe_cell(str(getattr(image, name))) for name in fields] for image in repair.dropped]
    atomic_write(report, csv_text([fields, *reasons]).encode())


def _dropped(read: ReadData) -> tuple[DroppedImage, ...]:
    data, digests = read.data, read.digests
    # As `check_leaks`: allowed kinds connect nothing.
    items, links = (
        [replace(item, group=None) for item in some] if "patient" in data.allow_leaks else some
        for some in (read.usable, read.unlabelled)
    )
    ids = {
        path: f"{content}{path}" if "content" in data.allow_leaks else content for path, content in digests.ids.items()
    }
    near = {} if "near" in data.allow_leaks else digests.near.key_of
    reasons = _reasons(read)
    item_of = {item.path: item for item in read.usable}
    dropped = []
    for cluster in find_clusters(items, ids, near=near, links=links):
        kept = _kept_split(cluster, item_of)
        for path in cluster.paths if kept is not None else ():
            item = item_of[path]
            if kept is not None and item.split is not None and item.split != kept:
                reason = reasons.get(path, f"connected with {min(cluster.paths)}")
                dropped.append(_dropped_image(item, item.split, kept, reason))
    return tuple(sorted(dropped, key=lambda image: image.path))


def _dropped_image(item: LabelledImage, split: Split, kept: Split, reason: str) -> DroppedImage:
    return DroppedImage(path=item.path, label=item.label, group=item.group or "", split=split, kept=kept, reason=reason)


def _kept_split(cluster: Cluster, item_of: dict[str, LabelledImage]) -> Split | None:
    """Return the split that keeps the images of a cluster, or None if they are in one split only."""
    splits = {item_of[path].split for path in cluster.paths} - {None}
    return next(split for split in _KEPT_FIRST if split in splits) if len(splits) > 1 else None


def _reasons(read: ReadData) -> dict[str, str]:
    """Return path -> the first leak that it is in."""
    reasons: dict[str, str] = {}
    for leak in find_leaks(read.every, read.digests.ids, read.digests.near, read.listing.unit):
        for path in leak.paths if leak.kind not in read.data.allow_leaks else ():
            reasons.setdefault(path, str(leak))
    return reasons


def _conflicts(
    data: DataSettings, listing: Listing, digests: Digests, items: Sequence[LabelledImage]
) -> tuple[Copies, ...]:
    left = ReadData(data, replace(listing, items=list(items)), digests)
    return tuple(copies for copies in find_copies(left) if copies.conflict)


def _missing(data: DataSettings, items: Sequence[LabelledImage], classes: Sequence[str]) -> list[str]:
    """Describe the gaps of complete splits; with images left to draw, prepare may fill them."""
    if any(item.split is None for item in items):
        return []
    present: dict[str, set[Split | None]] = defaultdict(set)
    for item in items:
        for name in names_in(item.label, data.task):
            present[name].add(item.split)
    given = {item.split for item in items}
    return [f"no {name!r} in {split}" for name in classes for split in SPLITS if split in given - present[name]]


def default_output(data: DataSettings, root: Path) -> Path:
    """Return the path of the repaired table: next to the user's, with `.repaired.csv` in place of its suffix.

    Raises:
        DataError: The labels are class folders.
    """
    if data.labels_file is None:
        raise DataError(
            "There is nothing to repair: the labels are class folders, without given splits.",
            "Drawn splits keep copies, near-duplicates and images of one patient together.",
            "Run `fpt prepare`.",
        )
    table = root / Path(data.labels_file).expanduser()
    return table.with_name(f"{posixpath.splitext(table.name)[0]}.repaired.csv")
