"""The manifest: one row per image, the hand-over from `prepare` to every later stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Contract
from schemas.tasks import Task, names_in

Split = Literal["train", "val", "test", "external"]
"""Which images: of a study train, val or test; external: images outside of it, which are only evaluated."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""Splits of a study."""
ImageId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestRow(Contract):
    """One image of a study."""

    id: ImageId
    """Sha256 of the file's content: the name of its features in the store."""
    path: str
    """Relative to `data.images`, with forward slashes."""
    label: str
    """One of the manifest's classes; with several labels an image, those that it has, joined by `|`."""
    group: str
    """Patient, or the image's own path where no group is known."""
    split: Split
    """One of `SPLITS`; in predictions of images outside of a study external."""


GroupUnit = Literal["patients", "groups"]
"""What the groups of a study are."""


class Manifest(Contract):
    """All rows of a study, sorted by path, and the classes in the order of the model's outputs."""

    classes: tuple[str, ...]
    """Label names; the index of a label here is its index in the logits."""
    rows: tuple[ManifestRow, ...]
    """Sorted by path. Two rows may share an id (a file under two names): then they share a split."""
    task: Task = "multiclass"
    """What the labels say."""
    unit: GroupUnit | None = None
    """What the groups are; None: not known, or each image stands for itself."""

    def names(self, row: ManifestRow) -> tuple[str, ...]:
        """The class names of one of its rows: one, or with several labels an image any number."""
        return names_in(row.label, self.task)

    def of(self, split: Split) -> Iterator[ManifestRow]:
        """The rows of one split, in order."""
        return (row for row in self.rows if row.split == split)

    def ids(self) -> tuple[str, ...]:
        """Each image content once, in order of first appearance."""
        return tuple(dict.fromkeys(row.id for row in self.rows))


class PrepareSummary(Contract):
    """The data set that `prepare` made, as in `outputs/manifest/summary.json`."""

    images: int
    """Rows of the manifest."""
    duplicates: int
    """Rows whose content another row has too."""
    groups: int
    """Patients (or other groups); images that stand for themselves are none."""
    singles: int = 0
    """Images that stand for themselves, as no group is known."""
    unit: GroupUnit | None = None
    """What the groups are; null: there are none."""
    group_column: str | None = None
    """Column of the groups, folder for sub-folders of class folders, or null."""
    split_column: str | None = None
    """Column of the ready splits, or null."""
    quarantined: int
    """Images set aside."""
    passed_over: dict[str, int] = Field(default_factory=dict)
    """Kind -> files and folders in which no image was read."""
    warned: int = 0
    """Images that are used although their data is corrupt (`data.on_warning: accept`)."""
    counts: dict[str, dict[str, int]]
    """split -> class -> images; with several labels an image, it counts for each of them."""
    split_images: dict[str, int]
    """split -> images."""


class PrepareResult(PrepareSummary):
    """What one run of `prepare` did."""

    known: int = 0
    """Images whose split an earlier run decided."""
    moved: dict[str, int] = Field(default_factory=dict)
    """Such as "train -> val" -> known images that changed split."""
    notes: tuple[str, ...] = ()
    """What was chosen or passed over, for people."""
