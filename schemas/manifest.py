"""The manifest: one row per image, written by `prepare` and read by all later stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Contract
from schemas.tasks import Task, names_in

Split = Literal["train", "val", "test", "external", "unlabelled"]
"""Split of an image: train, val or test in a study, external for images that are only evaluated, or unlabelled."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""Splits of a study."""
UNLABELLED: Split = "unlabelled"
"""In place of a split, for images without a label (`data.unlabelled: allow`)."""
Leak = Literal["content", "patient", "near"]
"""What images of two splits may share: their content, their patient or other group, or nearly the same picture."""
ImageId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestRow(Contract):
    """One image of a study."""

    id: ImageId
    """Sha256 of the file, which identifies its features in the store."""
    path: str
    """Relative to `data.images`, with forward slashes."""
    label: str
    """One of the classes of the manifest; multi-label: the labels of the image, joined by `|`; empty if unknown."""
    group: str
    """Patient or other group, or the path of the image if no group is known."""
    split: Split
    """One of `SPLITS`, external for predictions of images outside of a study, or unlabelled."""
    site: str | None = None
    """Hospital or other site, or None if unknown."""
    kept: dict[str, str] = Field(default_factory=dict)
    """Column of `data.keep_columns` -> value."""
    near: ImageId | None = None
    """Smallest id in its set of near-duplicates, or None if no other image is nearly the same."""


GroupUnit = Literal["patients", "groups"]
"""Kind of the groups of a study."""


class Manifest(Contract):
    """All rows of a study, sorted by path, and the classes in the order of the model's outputs."""

    classes: tuple[str, ...]
    """Label names, in the order of the logits."""
    rows: tuple[ManifestRow, ...]
    """Sorted by path. Rows with the same id (copies of a file) have the same split, unless `allow_leaks` lists
    content."""
    task: Task = "multiclass"
    """Task of the study."""
    unit: GroupUnit | None = None
    """Kind of the groups, or None if unknown or if no image has a group."""
    allow_leaks: tuple[Leak, ...] = ()
    """`data.allow_leaks` of the settings."""
    unlabelled: tuple[ManifestRow, ...] = ()
    """Images without a label, sorted by path: their features are cached, but nothing is trained or scored on them."""

    def names(self, row: ManifestRow) -> tuple[str, ...]:
        """Return the class names of a row: exactly one, or any number in a multi-label study."""
        return names_in(row.label, self.task)

    def of(self, split: Split) -> Iterator[ManifestRow]:
        """Iterate over the rows of one split, in order."""
        return (row for row in self.rows if row.split == split)

    def every(self) -> tuple[ManifestRow, ...]:
        """Return the rows with and without a label, sorted by path."""
        return tuple(sorted((*self.rows, *self.unlabelled), key=lambda row: row.path)) if self.unlabelled else self.rows

    def ids(self) -> tuple[str, ...]:
        """Return the id of each image, with or without a label, once, in order of first appearance."""
        return tuple(dict.fromkeys(row.id for row in self.every()))


class PrepareSummary(Contract):
    """Summary of a prepared data set, as in `outputs/manifest/summary.json`."""

    images: int
    """Rows of the manifest with a label."""
    unlabelled: int = 0
    """Rows without a label (`data.unlabelled: allow`)."""
    duplicates: int
    """Rows that share their content with another row."""
    near: int = 0
    """Images of which another image is a near-duplicate."""
    groups: int
    """Number of patients or other groups, without images that have no group."""
    singles: int = 0
    """Images without a group."""
    unit: GroupUnit | None = None
    """Kind of the groups, or null without groups."""
    group_column: str | None = None
    """Column with the groups, folder for sub-folders of class folders, or null."""
    split_column: str | None = None
    """Column with predefined splits, or null."""
    quarantined: int
    """Images that were set aside."""
    passed_over: dict[str, int] = Field(default_factory=dict)
    """Kind -> number of skipped files."""
    leaks: dict[Leak, int] = Field(default_factory=dict)
    """Allowed leak (`data.allow_leaks`) -> number of contents, groups or pairs of near-duplicates in several splits."""
    warned: int = 0
    """Images that are used despite corrupt data (`data.on_warning: accept`)."""
    counts: dict[str, dict[str, int]]
    """Split -> class -> images; a multi-label image counts for each of its labels."""
    split_images: dict[str, int]
    """Split -> images."""


class PrepareResult(PrepareSummary):
    """Result of one run of `prepare`."""

    known: int = 0
    """Images that an earlier run assigned to a split."""
    moved: dict[str, int] = Field(default_factory=dict)
    """Change, such as "train -> val" -> number of known images that changed split."""
    changes: tuple[str, ...] = ()
    """What changed since the last run and what has to be computed again, as lines for the user."""
    notes: tuple[str, ...] = ()
    """Automatic choices and skipped files, as lines for the user."""
