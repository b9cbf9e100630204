"""`prepare`: a folder of images and their labels become a manifest.

Every image is decoded once, so that a broken file is known before an hour of computing and not after it.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import UnreadableImagesError
from schemas.manifest import SPLITS, Manifest, ManifestRow, PrepareSummary
from schemas.settings import DataSettings
from schemas.tasks import Task, names_in, written
from stages.files import atomic_write, storage_errors
from stages.manifest import write_manifest
from stages.prepare.check import check_classes, check_conflicts, check_left
from stages.prepare.digest import Digests, digest_images
from stages.prepare.items import list_items
from stages.prepare.scan import Item
from stages.prepare.split import draw_splits, find_clusters, ready_splits
from stages.prepare.table import check_files
from stages.progress import Progress

MANIFEST_FILE = "manifest.parquet"
SUMMARY_FILE = "summary.json"
QUARANTINE_FILE = "quarantine.csv"


def prepare(data: DataSettings, root: Path, output: Path, progress: Progress | None = None) -> PrepareSummary:
    """Read all images, draw the splits, write the manifest.

    Writes `manifest.parquet`, `summary.json` and, where images were set aside, `quarantine.csv` (path, label, group,
    reason). Nothing is written unless everything is right.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.
        output: Folder of the outputs; made where it is missing.
        progress: Called with (images read, images).

    Raises:
        UnreadableImagesError: Images cannot be used; all are listed.
        DataError: Images and labels make no data set.
        StorageError: The output cannot be written.
    """
    images, items = list_items(data, root)
    classes = check_classes(items, data.classes or data.label_columns, data.task)
    if data.labels is not None and data.on_error == "fail":
        check_files(items, images, data.labels)
    digests = digest_images(
        items,
        images,
        max_pixels=data.max_pixels,
        min_side=data.min_side,
        accept_warnings=data.on_warning == "accept",
        progress=progress,
    )
    if digests.failures and data.on_error == "fail":
        raise UnreadableImagesError(
            sorted(digests.failures.items()),
            "Repair or remove them, or set data.on_error: quarantine in params.yaml to go on without them.",
        )
    usable = [item for item in items if item.path in digests.ids]
    check_left(usable, classes, len(digests.failures), data.task)
    check_conflicts(usable, digests.ids)
    manifest = _manifest(data, usable, classes, digests)
    summary = _summary(manifest, len(digests.failures), len(digests.warnings))
    _write_quarantine([item for item in items if item.path in digests.failures], digests, output / QUARANTINE_FILE)
    atomic_write(output / SUMMARY_FILE, (summary.model_dump_json(indent=2) + "\n").encode())
    write_manifest(manifest, output / MANIFEST_FILE)
    return summary


def _manifest(data: DataSettings, items: Sequence[Item], classes: tuple[str, ...], digests: Digests) -> Manifest:
    if data.split_column is None:
        clusters = find_clusters(items, digests.ids, data.task)
        split_of = draw_splits(clusters, data.val_share, data.test_share, data.seed)
    else:
        split_of = ready_splits(items, digests.ids, classes, data.task)
    # In the order of the items, which is that of the paths.
    rows = (
        ManifestRow(
            id=digests.ids[item.path],
            path=item.path,
            label=_in_order(item.label, classes, data.task),
            group=item.path if item.group is None else item.group,
            split=split_of[item.path],
        )
        for item in items
    )
    return Manifest(classes=classes, rows=tuple(rows), task=data.task)


def _in_order(label: str, classes: Sequence[str], task: Task) -> str:
    """Several labels in the order of the classes."""
    return written(sorted(names_in(label, task), key=classes.index))


def _summary(manifest: Manifest, quarantined: int, warned: int) -> PrepareSummary:
    copies = Counter(row.id for row in manifest.rows)
    counts = Counter((row.split, name) for row in manifest.rows for name in manifest.names(row))
    return PrepareSummary(
        images=len(manifest.rows),
        duplicates=sum(copies[row.id] > 1 for row in manifest.rows),
        groups=len({row.group for row in manifest.rows}),
        quarantined=quarantined,
        warned=warned,
        counts={split: {label: counts[split, label] for label in manifest.classes} for split in SPLITS},
        split_images={split: sum(row.split == split for row in manifest.rows) for split in SPLITS},
    )


def _write_quarantine(items: Sequence[Item], digests: Digests, path: Path) -> None:
    if not items:
        # A file of an earlier run would accuse images that are in the manifest now.
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "group", "reason"])
    writer.writerows([item.path, item.label, item.group or "", digests.failures[item.path]] for item in items)
    atomic_write(path, text.getvalue().encode())
