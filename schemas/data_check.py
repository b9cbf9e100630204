"""Result of `fpt data check`: what a data set contains, and what may be wrong with it."""

from __future__ import annotations

from pydantic import Field

from schemas.base import Contract
from schemas.manifest import GroupUnit, Split
from schemas.tasks import Task


class Probe(Contract):
    """How well something other than the finding predicts the labels of unseen patients."""

    name: str
    """What the probe reads: "width, height, file bytes", "8 x 8 thumbnail", or a column such as site."""
    accuracy: float
    """Balanced accuracy, 0 to 1. Neighbours are images of other clusters; a column predicts its most typical label."""
    chance: tuple[float, float, float]
    """Median, 0.5th and 99.5th percentile of the accuracy with labels permuted between clusters."""
    images: int
    """Images that were predicted."""
    suspected: bool
    """Whether the accuracy is above every accuracy by chance."""


class Copies(Contract):
    """Images with the same content, or two images that are nearly the same."""

    paths: tuple[str, ...]
    """Sorted."""
    labels: tuple[str | None, ...]
    """Label of each image, or None if it is unknown."""
    similarity: float = 1.0
    """Correlation of the thumbnails after removal of what all images share; or cosine of the features."""

    @property
    def conflict(self) -> bool:
        """Whether the known labels differ."""
        return len(set(self.labels) - {None}) > 1


class DataCheck(Contract):
    """What a data set contains, and what may be wrong with it."""

    task: Task
    """Task of the study."""
    unit: GroupUnit | None
    """Kind of the groups, or None if no image has one."""
    images: int
    """Listed images with a label, or of which the label is an error."""
    unlabelled: int = 0
    """Images without a label that `data.unlabelled` allows."""
    groups: int
    """Patients or other groups; an image without one counts as a group."""
    classes: tuple[str, ...]
    """Labels, in the order of the model's outputs."""
    by_class: dict[str, dict[str, int]]
    """Class -> "images", unit of the groups, and splits -> number; images without a label are in the class ""."""
    columns: dict[str, dict[str, dict[str, int]]] = Field(default_factory=dict)
    """Site and other columns with few values, "format", "mode" and "bits" -> value -> class -> images."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Width x height -> images, the most frequent first."""
    unreadable: dict[str, str] = Field(default_factory=dict)
    """Path -> reason."""
    problems: tuple[str, ...] = ()
    """Images without a label and class folders without images."""
    skipped: tuple[str, ...] = ()
    """Files that are not read as images."""
    corrupt: dict[str, str] = Field(default_factory=dict)
    """Path -> warning of the decoder, for images that are used nevertheless."""
    tiny: tuple[str, ...] = ()
    """Images with a side of less than a quarter of the input of the LPM."""
    blank: tuple[str, ...] = ()
    """Images of nearly one grey value."""
    duplicates: tuple[Copies, ...] = ()
    """Byte-identical images."""
    near: tuple[Copies, ...] = ()
    """Pairs of images that are nearly the same."""
    similar_features: tuple[Copies, ...] | None = None
    """Pairs of images whose cached features are nearly the same; None without features."""
    leaks: tuple[str, ...] = ()
    """What images of two splits share."""
    probes: tuple[Probe, ...] = ()
    """Suspected shortcuts and what was tried."""

    @property
    def conflicts(self) -> tuple[Copies, ...]:
        """Copies and near-duplicates with different labels."""
        return tuple(copies for copies in (*self.duplicates, *self.near) if copies.conflict)


class DroppedImage(Contract):
    """An image that a repair leaves out."""

    path: str
    """As in the manifest."""
    label: str
    """As in the manifest."""
    group: str
    """Patient or other group, empty if unknown."""
    split: Split
    """Train or val."""
    kept: Split
    """Split that keeps the images it belongs to."""
    reason: str
    """What it shares with images of that split."""


class Repair(Contract):
    """Result of `fpt data repair`."""

    rows: int
    """Rows of the repaired table."""
    dropped: tuple[DroppedImage, ...]
    """Images that it leaves out, sorted by path."""
    conflicts: tuple[Copies, ...]
    """Copies and near-duplicates with different labels that are left: they have to be corrected by a person."""
    missing: tuple[str, ...]
    """Classes that are missing in a split of the repaired table, in words."""
