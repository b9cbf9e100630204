"""What a recipe of a published data set is: where it comes from, how it is laid out, and what is known of it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from schemas.base import Contract
from schemas.manifest import Split
from schemas.tasks import Task


class Paths(Contract):
    """Every image is a file whose path tells its label."""

    pattern: str
    """Regular expression for the complete path below the download, with the groups `label` and, if the path names a
    patient, `patient`."""


class Sheet(Contract):
    """A table of labels and the folder of its images. Both are found at any depth of the download."""

    file: str
    """End of the path of the table, CSV or XLSX."""
    folder: str
    """End of the path of the folder of the images."""
    split: Split | None = None
    """Split of these images; None: it is drawn."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a table without a header; empty: its first row."""
    delimiter: str = ","
    """Separator of the columns of a table without a header."""
    image: str = "image"
    """Column with the name of the image, with or without folder and suffix; case does not count."""
    labels: tuple[str, ...] = ("label",)
    """Column with the label; several: 0/1 columns, each named after its label."""
    patient: str = ""
    """Column with the patient or another group; empty: none."""


class Groups(Contract):
    """A further table that tells which images belong together."""

    file: str
    """End of the path of the table."""
    images: tuple[str, ...]
    """Columns with names of images."""
    group: str = ""
    """Column with the group of the image; empty: the images of a row are one group."""


class Tables(Contract):
    """Labels are in tables."""

    sheets: tuple[Sheet, ...]
    """At least one."""
    groups: Groups | None = None
    """Which images belong together; None: `Sheet.patient`, or not known."""


class DicomSides(Contract):
    """Labels are those of a side of a patient, in a table; patient and side of an image are in its DICOM header."""

    file: str
    """End of the path of the table, without suffix: CSV or XLSX."""
    patient: str
    """Column with the patient."""
    side: str
    """Column with L or R."""
    label: str
    """Column with the label."""


class Arrays(Contract):
    """Images and labels are arrays of one .npz file, named after the split: train_images, train_labels, ..."""

    files: tuple[str, ...]
    """Names of the file, the best first."""


Reading = Paths | Tables | DicomSides | Arrays
"""How labels are read."""


class Published(Contract):
    """Published counts of images."""

    split: Split | None = None
    """Of this split; None: of all images."""
    images: int
    """Images with a label that the recipe keeps."""
    labels: dict[str, int] = Field(default_factory=dict)
    """Images of each label; empty: not published, or not verified."""


class Recipe(Contract):
    """How the original download of a published data set becomes a study."""

    name: str
    """On the command line."""
    title: str
    """For people."""
    kind: str
    """What the images are."""
    source: str
    """Page or DOI."""
    licence: str
    """As stated by the source; empty: not verified, read it there."""
    layout: tuple[str, ...]
    """Files and folders that are expected, each at any depth."""
    reading: Reading
    """How labels are read."""
    labels: dict[str, str | None]
    """Label of the source -> class, in the order of the outputs; None: such images are left out."""
    task: Task = "multiclass"
    """Kind of the labels."""
    group: str = ""
    """What the images that stay together have in common, such as patient: the column in the table of labels; empty:
    not known."""
    patients: str
    """The same in words."""
    splits: str
    """Whose splits they are."""
    published: tuple[Published, ...] = ()
    """Verified counts; empty: none."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Published settings, by dotted name."""
    lists: dict[Split, str] = Field(default_factory=dict)
    """Split -> end of the path of the published list of its images, with {shots} and {draw} in place of numbers; empty:
    none. Images in no list are test images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes in the order of the outputs."""
        return tuple(dict.fromkeys(label for label in self.labels.values() if label is not None))

    @property
    def writes_images(self) -> bool:
        """Whether images are written into the study, because the download has none."""
        return isinstance(self.reading, Arrays)

    @property
    def has_splits(self) -> bool:
        """Whether images come with their split."""
        return self.writes_images or (
            isinstance(self.reading, Tables) and any(sheet.split is not None for sheet in self.reading.sheets)
        )
