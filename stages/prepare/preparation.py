"""Check all images, assign their splits, and write the manifest.

Every image is decoded once here, so that a broken file is reported before hours of computing rather than after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from schemas.data_settings import DataSettings
from schemas.errors import DataError, ManifestError, UnreadableImagesError
from schemas.manifest import UNLABELLED, Manifest, ManifestRow, PrepareResult, PrepareSummary, Split
from schemas.rendering import DEFAULT_RENDERING, Rendering
from schemas.tasks import Task, names_in, written
from stages.files import atomic_write
from stages.manifest import read_manifest, write_manifest
from stages.prepare.changes import describe_changes
from stages.prepare.class_names import check_named, class_order
from stages.prepare.dataset_listing import Listing, layout_error, read_listing
from stages.prepare.exports import write_quarantine
from stages.prepare.image_digests import Digests, read_images
from stages.prepare.label_checks import check_classes, check_conflicts, check_left
from stages.prepare.label_table import check_files
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.shots import draw_shots
from stages.prepare.split_assignment import assign_splits
from stages.prepare.split_history import KnownSplits, latest_copy, locked, read_known, write_known
from stages.prepare.summary import describe, summarise
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
    index: Path | None = None,
    full: bool = False,
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
        index: Folder that remembers what was read of each file (`stages.prepare.image_index`), or None to read all.
        full: Read every file again, and remember it.
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
        check_files(listing.every, listing.images, data.labels_file)
    digests = read_images(listing.every, listing.images, data, progress, index, full, rendering)
    if data.on_error == "fail":
        _check_all(listing, digests)
    usable = _usable(items, digests)
    check_left(usable, classes, len(digests.failures), data.task)
    check_conflicts(usable, digests.ids)
    with locked(history, data):
        before = KnownSplits() if history is None else _earlier_splits(history, data, redraw)
        known = KnownSplits() if redraw else before
        split_of = _splits(data, listing, usable, digests, classes, known)
        complete = _manifest(data, listing, classes, digests, split_of)
        manifest = complete if data.shots is None else draw_shots(complete, data.shots, data.seed)
        listing.notes.extend(digests.remark_lines())
        summary = summarise(manifest, listing, digests)
        result = _compare(_last_manifest(output, history), before, summary, data, listing, manifest)
        write_quarantine(listing.set_aside(), listing.every, digests.failures, output / QUARANTINE_FILE)
        atomic_write(output / SUMMARY_FILE, (summary.model_dump_json(indent=2) + "\n").encode())
        write_manifest(manifest, output / MANIFEST_FILE)
        if history is not None:
            write_known(history, data, known.with_manifest(complete), manifest)
    return result


def _compare(
    last: Manifest | None,
    before: KnownSplits,
    summary: PrepareSummary,
    data: DataSettings,
    listing: Listing,
    manifest: Manifest,
) -> PrepareResult:
    """Describe a manifest, and what changed since the last one."""
    earlier = before if before.contents or last is None else KnownSplits().with_manifest(last)
    changes = () if last is None else describe_changes(last, manifest)
    return describe(summary, data, listing, manifest, earlier, changes)


def _last_manifest(output: Path, history: Path | None) -> Manifest | None:
    """Return the manifest that is about to be replaced, or None before the first run.

    DVC deletes the manifest before it runs the stage again; the latest copy in the history then takes its place.
    """
    file = output / MANIFEST_FILE
    if not file.exists() and history is not None:
        file = latest_copy(history) or file
    try:
        return read_manifest(file)
    except ManifestError:
        return None


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
        return assign_splits(
            items, digests.ids, classes, data, known, listing.unit, digests.near, _usable(listing.unlabelled, digests)
        )
    except DataError as error:
        # The error may be due to columns that were chosen automatically.
        if AUTO not in (data.group_column, data.split_column) or not listing.notes:
            raise
        cause = "\n".join([error.cause, *listing.notes])
        repair = (
            f"{error.repair}\nIf a column was misinterpreted, set data.group_column or data.split_column explicitly."
        )
        raise DataError(error.state, cause, repair) from None


def _usable(items: Sequence[LabelledImage], digests: Digests) -> list[LabelledImage]:
    return [item for item in items if item.path in digests.ids]


def _manifest(
    data: DataSettings, listing: Listing, classes: tuple[str, ...], digests: Digests, split_of: dict[str, Split]
) -> Manifest:
    near = {} if "near" in data.allow_leaks else digests.near.key_of

    def row(item: LabelledImage, label: str, split: Split) -> ManifestRow:
        return ManifestRow(
            id=digests.ids[item.path],
            path=item.path,
            label=label,
            group=item.path if item.group is None else item.group,
            split=split,
            site=item.site,
            kept={name: item.others[name] for name in data.keep_columns},
            near=near.get(item.path),
        )

    # Both are sorted by path, as a manifest has to be.
    labelled = (
        row(item, _in_order(item.label, classes, data.task), split_of[item.path])
        for item in _usable(listing.items, digests)
    )
    return Manifest(
        classes=classes,
        rows=tuple(labelled),
        task=data.task,
        unit=listing.unit,
        allow_leaks=data.allow_leaks,
        unlabelled=tuple(row(item, "", UNLABELLED) for item in _usable(listing.unlabelled, digests)),
    )


def _in_order(label: str, classes: Sequence[str], task: Task) -> str:
    """Sort the labels of a multi-label image in the order of the classes."""
    return written(sorted(names_in(label, task), key=classes.index))
