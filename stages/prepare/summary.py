"""Summarise a prepared data set, and describe for the user what a run of `prepare` decided."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from schemas.data_settings import DataSettings
from schemas.manifest import SPLITS, Leak, Manifest, PrepareResult, PrepareSummary
from schemas.text import counted
from stages.prepare.class_names import numbers_hint
from stages.prepare.dataset_listing import Listing
from stages.prepare.image_digests import Digests
from stages.prepare.image_files import skipped_lines
from stages.prepare.leaks import check_leaks
from stages.prepare.split_history import KnownSplits

_LARGE_SET, _LARGE_SHARE = 10, 0.05
"""Number of near-duplicates of one another, and their share of all images, above which the user is warned."""


def summarise(manifest: Manifest, listing: Listing, digests: Digests) -> PrepareSummary:
    """Return the summary that is written next to the manifest."""
    copies = Counter(row.id for row in manifest.rows)
    counts = Counter((row.split, name) for row in manifest.rows for name in manifest.names(row))
    grouped = [row.group for row in manifest.rows if row.group != row.path]
    return PrepareSummary(
        images=len(manifest.rows),
        unlabelled=len(manifest.unlabelled),
        duplicates=sum(copies[row.id] > 1 for row in manifest.rows),
        near=sum(row.near is not None for row in manifest.rows),
        groups=len(set(grouped)),
        singles=len(manifest.rows) - len(grouped),
        unit=listing.unit,
        group_column=listing.group_column,
        split_column=listing.split_column,
        quarantined=len(digests.failures) + len(listing.stray) + len(listing.missing_labels) + len(listing.unmatched),
        passed_over=dict(sorted(Counter(file.reason for file in listing.skipped).items())),
        leaks=_allowed_leaks(manifest, listing, digests),
        warned=len(digests.warnings),
        counts={split: {label: counts[split, label] for label in manifest.classes} for split in SPLITS},
        split_images={split: sum(row.split == split for row in manifest.rows) for split in SPLITS},
    )


def _allowed_leaks(manifest: Manifest, listing: Listing, digests: Digests) -> dict[Leak, int]:
    if not manifest.allow_leaks:
        return {}
    split_of = {row.path: row.split for row in manifest.rows}
    items = [replace(item, split=split_of[item.path]) for item in listing.items if item.path in split_of]
    items += [item for item in listing.unlabelled if item.path in digests.ids]
    return check_leaks(items, digests.ids, digests.near, listing.unit, manifest.allow_leaks)


def describe(
    summary: PrepareSummary,
    data: DataSettings,
    listing: Listing,
    manifest: Manifest,
    before: KnownSplits,
    changes: tuple[str, ...] = (),
) -> PrepareResult:
    """Return the result of a run: its summary, changed splits, and notes for the user.

    Args:
        summary: From `summarise`.
        data: Settings.
        listing: The images as listed by the user.
        manifest: The manifest that is about to be written.
        before: Splits of earlier draws, or of the manifest that is about to be replaced.
        changes: From `describe_changes`.
    """
    splits = {(row.id, row.split) for row in manifest.rows}
    several = {one for one, number in Counter(content for content, _ in splits).items() if number > 1}
    known = [
        (before.contents[row.id], row.split)
        for row in manifest.rows
        if row.id in before.contents and row.id not in several
    ]
    moved = Counter(f"{old} -> {new}" for old, new in known if old != new)
    notes = [
        *listing.notes,
        *numbers_hint(data, manifest.classes),
        *_unlabelled_notes(manifest),
        *_leak_notes(summary),
        *_large_sets(manifest),
        *_small_splits(summary, data, len(known)),
        *skipped_lines(listing.skipped, listing.images),
    ]
    return PrepareResult(
        **summary.model_dump(), known=len(known), moved=dict(sorted(moved.items())), changes=changes, notes=tuple(notes)
    )


def _small_splits(summary: PrepareSummary, data: DataSettings, known: int) -> list[str]:
    """Warn of each split that has become less than half as large as the settings request."""
    if not known or summary.split_column is not None or data.split_files is not None:
        return []
    shares = {"val": data.val_share, "test": data.test_share}
    return [
        f"Only {summary.split_images[split] / summary.images:.0%} of the images are in {split} "
        f"(data.{split}_share: {share:.0%}), because known images keep their split. To draw all splits again: "
        "`fpt prepare --redraw`"
        for split, share in shares.items()
        if summary.split_images[split] < share * summary.images / 2
    ]


def _large_sets(manifest: Manifest) -> list[str]:
    """Warn of a set of near-duplicates that is large enough to be a mistake of the comparison."""
    sets = Counter(row.near for row in manifest.rows if row.near is not None)
    largest = max(sets.values(), default=0)
    if largest <= max(_LARGE_SET, len(manifest.rows) * _LARGE_SHARE):
        return []
    return [
        f"Warning: {largest:,} images are nearly the same, directly or through others, and stay in one split. If they "
        "are different pictures that look alike, set data.allow_leaks: [near] to compare contents and patients only."
    ]


def _unlabelled_notes(manifest: Manifest) -> list[str]:
    if not manifest.unlabelled:
        return []
    labelled = {row.id for row in manifest.rows}
    copies = sum(row.id in labelled for row in manifest.unlabelled)
    same = f" {copies:,} of them are copies of images with a label." if copies else ""
    return [
        f"{counted(len(manifest.unlabelled), 'image')} without a label (data.unlabelled: allow): `fpt extract` caches "
        f"their features, `fpt predict --unlabelled` predicts them; nothing is trained or scored on them.{same}"
    ]


def _leak_notes(summary: PrepareSummary) -> list[str]:
    unit = (summary.unit or "groups").removesuffix("s")
    nouns: dict[Leak, str] = {"content": "content", "patient": unit, "near": "near-duplicate pair"}
    return [
        f"Warning: {counted(number, nouns[kind])} in several splits (data.allow_leaks: {kind})."
        for kind, number in summary.leaks.items()
    ]
