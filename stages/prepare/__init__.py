"""`prepare`: a folder of images and their labels become a manifest.

Every image is decoded once, so that a broken file is known before an hour of computing and not after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import DataError, ManifestError, UnreadableImagesError
from schemas.manifest import SPLITS, GroupUnit, Manifest, ManifestRow, PrepareResult, PrepareSummary, Split
from schemas.settings import DataSettings
from schemas.tasks import Task, names_in, written
from stages.files import atomic_write
from stages.manifest import read_manifest, write_manifest
from stages.prepare.assign import assign_splits
from stages.prepare.check import check_classes, check_conflicts, check_left
from stages.prepare.class_names import check_named, class_order, numbers_hint
from stages.prepare.columns import AUTO
from stages.prepare.digest import Digests, digest_images
from stages.prepare.exports import write_quarantine
from stages.prepare.items import Listing, layout_error, read_listing
from stages.prepare.memory import KnownSplits, latest_copy, locked, read_known, write_known
from stages.prepare.scan import Item
from stages.prepare.survey import passed_over_lines
from stages.prepare.table import check_files
from stages.progress import Progress

MANIFEST_FILE = "manifest.parquet"
SUMMARY_FILE = "summary.json"
QUARANTINE_FILE = "quarantine.csv"


def prepare(
    data: DataSettings,
    root: Path,
    output: Path,
    progress: Progress | None = None,
    memory: Path | None = None,
    redraw: bool = False,
) -> PrepareResult:
    """Read all images, give each a split, write the manifest.

    Writes `manifest.parquet`, `summary.json` and, where images were set aside, `quarantine.csv` (path, label, group,
    reason). Nothing is written unless everything is right.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.
        output: Folder of the outputs; made where it is missing.
        progress: Called with (images read, images).
        memory: Folder of what earlier draws decided (`stages.prepare.memory`); None: every run draws by itself.
        redraw: Draw all splits again, whatever was decided earlier.

    Raises:
        UnreadableImagesError: Images cannot be used; all are listed.
        DataError: Images and labels make no data set.
        StorageError: The output cannot be written.
    """
    listing = read_listing(data, root)
    items = listing.items
    classes = check_classes(items, class_order(data), data.task)
    check_named(data, items)
    if data.labels is not None and data.on_error == "fail":
        check_files(items, listing.images, data.labels)
    digests = digest_images(
        items,
        listing.images,
        max_pixels=data.max_pixels,
        min_side=data.min_side,
        accept_warnings=data.on_warning == "accept",
        progress=progress,
    )
    if data.on_error == "fail":
        _check_all(listing, digests)
    usable = [item for item in items if item.path in digests.ids]
    check_left(usable, classes, len(digests.failures), data.task)
    check_conflicts(usable, digests.ids)
    with locked(memory, data):
        before = KnownSplits() if memory is None else _before(memory, data, redraw)
        known = KnownSplits() if redraw else before
        split_of = _splits(data, listing, usable, digests, classes, known)
        manifest = _manifest(data, usable, classes, digests, split_of, listing.unit)
        summary = _summary(manifest, listing, digests)
        result = _result(summary, data, listing, manifest, before if before.contents else _replaced(output, memory))
        write_quarantine(listing.set_aside(), items, digests.failures, output / QUARANTINE_FILE)
        atomic_write(output / SUMMARY_FILE, (summary.model_dump_json(indent=2) + "\n").encode())
        write_manifest(manifest, output / MANIFEST_FILE)
        if memory is not None:
            write_known(memory, data, known.with_manifest(manifest), manifest)
    return result


def _replaced(output: Path, memory: Path | None) -> KnownSplits:
    """Splits of the manifest that this one replaces: another draw changes them, and that is reported too.

    DVC deletes the manifest before it runs the stage again; then the latest copy counts.
    """
    file = output / MANIFEST_FILE
    if not file.exists() and memory is not None:
        file = latest_copy(memory) or file
    try:
        return KnownSplits().with_manifest(read_manifest(file))
    except ManifestError:
        return KnownSplits()


def _before(memory: Path, data: DataSettings, redraw: bool) -> KnownSplits:
    try:
        return read_known(memory, data)
    except ManifestError:
        if not redraw:
            raise
        return KnownSplits()


def _check_all(listing: Listing, digests: Digests) -> None:
    """Refuse what cannot be used, all of it in one message."""
    failures = sorted(digests.failures.items())
    if listing.problems():
        raise layout_error(listing, failures)
    if failures:
        raise UnreadableImagesError(
            failures, "Repair or remove them, or set data.on_error: quarantine in params.yaml to continue without them."
        )


def _splits(
    data: DataSettings,
    listing: Listing,
    items: Sequence[Item],
    digests: Digests,
    classes: tuple[str, ...],
    known: KnownSplits,
) -> dict[str, Split]:
    try:
        return assign_splits(items, digests.ids, classes, data, known, listing.unit)
    except DataError as error:
        # What was chosen by name or layout may be what is wrong.
        if AUTO not in (data.group_column, data.split_column) or not listing.notes:
            raise
        cause = "\n".join([error.cause, *listing.notes])
        repair = (
            f"{error.repair}\nIf a column was taken for what it is not, set data.group_column or data.split_column."
        )
        raise DataError(error.state, cause, repair) from None


def _manifest(
    data: DataSettings,
    items: Sequence[Item],
    classes: tuple[str, ...],
    digests: Digests,
    split_of: dict[str, Split],
    unit: GroupUnit | None,
) -> Manifest:
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
    return Manifest(classes=classes, rows=tuple(rows), task=data.task, unit=unit)


def _in_order(label: str, classes: Sequence[str], task: Task) -> str:
    """Several labels in the order of the classes."""
    return written(sorted(names_in(label, task), key=classes.index))


def _summary(manifest: Manifest, listing: Listing, digests: Digests) -> PrepareSummary:
    copies = Counter(row.id for row in manifest.rows)
    counts = Counter((row.split, name) for row in manifest.rows for name in manifest.names(row))
    grouped = [row.group for row in manifest.rows if row.group != row.path]
    return PrepareSummary(
        images=len(manifest.rows),
        duplicates=sum(copies[row.id] > 1 for row in manifest.rows),
        groups=len(set(grouped)),
        singles=len(manifest.rows) - len(grouped),
        unit=listing.unit,
        group_column=listing.group_column,
        split_column=listing.split_column,
        quarantined=len(digests.failures) + len(listing.stray),
        passed_over=dict(sorted(Counter(one.reason for one in listing.passed_over).items())),
        warned=len(digests.warnings),
        counts={split: {label: counts[split, label] for label in manifest.classes} for split in SPLITS},
        split_images={split: sum(row.split == split for row in manifest.rows) for split in SPLITS},
    )


def _result(
    summary: PrepareSummary, data: DataSettings, listing: Listing, manifest: Manifest, before: KnownSplits
) -> PrepareResult:
    known = [(before.contents[row.id], row.split) for row in manifest.rows if row.id in before.contents]
    moved = Counter(f"{old} -> {new}" for old, new in known if old != new)
    notes = [
        *listing.notes,
        *numbers_hint(data, manifest.classes),
        *_small_splits(summary, data, len(known)),
        *passed_over_lines(listing.passed_over, listing.images),
    ]
    return PrepareResult(
        **summary.model_dump(), known=len(known), moved=dict(sorted(moved.items())), notes=tuple(notes)
    )


def _small_splits(summary: PrepareSummary, data: DataSettings, known: int) -> list[str]:
    """A line for people for each split that has become much smaller than it should be."""
    if not known or summary.split_column is not None:
        return []
    shares = {"val": data.val_share, "test": data.test_share}
    return [
        f"Only {summary.split_images[split] / summary.images:.0%} of the images are in {split} "
        f"(data.{split}_share: {share:.0%}), since known images keep their split: `fpt prepare --redraw` draws again."
        for split, share in shares.items()
        if summary.split_images[split] < share * summary.images / 2
    ]
