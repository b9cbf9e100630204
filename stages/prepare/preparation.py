"""Check all images, assign their splits, and write the manifest.

Every image is decoded once here, so that a broken file is reported before hours of computing rather than after them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import DataError, ManifestError, UnreadableImagesError
from schemas.manifest import SPLITS, GroupUnit, Manifest, ManifestRow, PrepareResult, PrepareSummary, Split
from schemas.rendering import DEFAULT_RENDERING, Rendering
from schemas.settings import DataSettings
from schemas.tasks import Task, names_in, written
from stages.files import atomic_write
from stages.manifest import read_manifest, write_manifest
from stages.prepare.class_names import check_named, class_order, numbers_hint
from stages.prepare.dataset_listing import Listing, layout_error, read_listing
from stages.prepare.exports import write_quarantine
from stages.prepare.image_digests import Digests, digest_images
from stages.prepare.image_files import skipped_lines
from stages.prepare.label_checks import check_classes, check_conflicts, check_left
from stages.prepare.label_table import check_files
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.split_assignment import assign_splits
from stages.prepare.split_history import KnownSplits, latest_copy, locked, read_known, write_known
from stages.prepare.table_columns import AUTO
from stages.progress import Progress

MANIFEST_FILE = "manifest.parquet"
SUMMARY_FILE = "summary.json"
QUARANTINE_FILE = "quarantine.csv"


def prepare(
    data: DataSettings,
    root: Path,
    output: Path,
    progress: Progress | None = None,
    history: Path | None = None,
    redraw: bool = False,
    rendering: Rendering = DEFAULT_RENDERING,
) -> PrepareResult:
    """Read all images, assign a split to each, and write the manifest.

    Writes `manifest.parquet`, `summary.json` and, if images were excluded, `quarantine.csv` (path, label, group,
    reason). Nothing is written unless all checks pass.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.
        output: Output folder, created if missing.
        progress: Called with (images read, images).
        history: Folder with the splits of earlier draws (`stages.prepare.split_history`), or None to ignore them.
        redraw: Draw all splits again, regardless of earlier draws.
        rendering: Window and frame of images that leave a choice.

    Raises:
        UnreadableImagesError: Images cannot be used; all are listed.
        DataError: Images and labels do not form a valid data set.
        StorageError: The output cannot be written.
    """
    listing = read_listing(data, root, None if history is None else history.parent)
    items = listing.items
    classes = check_classes(items, class_order(data), data.task)
    check_named(data, items)
    if data.labels_file is not None and data.on_error == "fail":
        check_files(items, listing.images, data.labels_file)
    digests = digest_images(
        items,
        listing.images,
        max_pixels=data.max_pixels,
        min_side=data.min_side,
        accept_warnings=data.on_warning == "accept",
        rendering=rendering,
        progress=progress,
    )
    if data.on_error == "fail":
        _check_all(listing, digests)
    usable = [item for item in items if item.path in digests.ids]
    check_left(usable, classes, len(digests.failures), data.task)
    check_conflicts(usable, digests.ids)
    with locked(history, data):
        before = KnownSplits() if history is None else _earlier_splits(history, data, redraw)
        known = KnownSplits() if redraw else before
        split_of = _splits(data, listing, usable, digests, classes, known)
        manifest = _manifest(data, usable, classes, digests, split_of, listing.unit)
        summary = _summary(manifest, listing, digests)
        listing.notes.extend(digests.remark_lines())
        result = _result(summary, data, listing, manifest, before if before.contents else _replaced(output, history))
        write_quarantine(listing.set_aside(), items, digests.failures, output / QUARANTINE_FILE)
        atomic_write(output / SUMMARY_FILE, (summary.model_dump_json(indent=2) + "\n").encode())
        write_manifest(manifest, output / MANIFEST_FILE)
        if history is not None:
            write_known(history, data, known.with_manifest(manifest), manifest)
    return result


def _replaced(output: Path, history: Path | None) -> KnownSplits:
    """Return the splits of the manifest that is about to be replaced, to report which images another draw moves.

    DVC deletes the manifest before it runs the stage again; the latest copy in the history then takes its place.
    """
    file = output / MANIFEST_FILE
    if not file.exists() and history is not None:
        file = latest_copy(history) or file
    try:
        return KnownSplits().with_manifest(read_manifest(file))
    except ManifestError:
        return KnownSplits()


def _earlier_splits(history: Path, data: DataSettings, redraw: bool) -> KnownSplits:
    try:
        return read_known(history, data)
    except ManifestError:
        if not redraw:
            raise
        return KnownSplits()


def _check_all(listing: Listing, digests: Digests) -> None:
    """Refuse unusable entries, all of them in one message."""
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
    items: Sequence[LabelledImage],
    digests: Digests,
    classes: tuple[str, ...],
    known: KnownSplits,
) -> dict[str, Split]:
    try:
        return assign_splits(items, digests.ids, classes, data, known, listing.unit)
    except DataError as error:
        # The error may be due to columns that were chosen automatically.
        if AUTO not in (data.group_column, data.split_column) or not listing.notes:
            raise
        cause = "\n".join([error.cause, *listing.notes])
        repair = (
            f"{error.repair}\nIf a column was misinterpreted, set data.group_column or data.split_column explicitly."
        )
        raise DataError(error.state, cause, repair) from None


def _manifest(
    data: DataSettings,
    items: Sequence[LabelledImage],
    classes: tuple[str, ...],
    digests: Digests,
    split_of: dict[str, Split],
    unit: GroupUnit | None,
) -> Manifest:
    # `items` are sorted by path, as a manifest has to be.
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
    """Sort the labels of a multi-label image in the order of the classes."""
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
        quarantined=len(digests.failures) + len(listing.stray) + len(listing.unlabelled),
        passed_over=dict(sorted(Counter(file.reason for file in listing.skipped).items())),
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
        *skipped_lines(listing.skipped, listing.images),
    ]
    return PrepareResult(
        **summary.model_dump(), known=len(known), moved=dict(sorted(moved.items())), notes=tuple(notes)
    )


def _small_splits(summary: PrepareSummary, data: DataSettings, known: int) -> list[str]:
    """Warn of each split that has become less than half as large as the settings request."""
    if not known or summary.split_column is not None:
        return []
    shares = {"val": data.val_share, "test": data.test_share}
    return [
        f"Only {summary.split_images[split] / summary.images:.0%} of the images are in {split} "
        f"(data.{split}_share: {share:.0%}), because known images keep their split. To draw all splits again: "
        "`fpt prepare --redraw`"
        for split, share in shares.items()
        if summary.split_images[split] < share * summary.images / 2
    ]
