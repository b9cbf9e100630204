"""The section `data` of the settings: images, labels, patients and splits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.base import Name, Section, Word
from schemas.manifest import Leak
from schemas.tasks import SEPARATOR, Task

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)]
ClassNames = Annotated[dict[Name, Name], Field(max_length=10_000)]
TagColumns = Annotated[dict[Name, Name], Field(min_length=1, max_length=20)]
TagFilter = Annotated[dict[Name, tuple[Name, ...]], Field(min_length=1, max_length=20)]
SplitFiles = Annotated[dict[Literal["train", "val", "test"], Name], Field(min_length=1)]
REST = "rest"
"""Value of `data.split_files` for all images that the other lists do not have."""
TAGS = "tags"
"""Value of `data.labels` for labels from the headers of DICOM files."""


def _label_text(value: object) -> object:
    """Convert a label that YAML parsed as a number to text: 0 becomes "0"."""
    if isinstance(value, bool):
        # YAML also parses yes, no, on and off as booleans, so the label as the user wrote it is lost.
        raise ValueError(f"a label reads as {str(value).lower()}: put it in quotes, such as 'yes'")
    return str(value) if isinstance(value, int | float) else value


class DataSettings(Section):
    """Images, labels, and splits."""

    task: Task = "multiclass"
    """Kind of labels: multiclass (one class per image, two classes included), multilabel (any number of labels per
    image, including zero) or ordinal (one grade per image, in the order of `classes`)."""
    images: Name = "data/images"
    """Folder of the images; relative paths start at the folder of `params.yaml`."""
    labels: Name | None = None
    """Table with one row per image (CSV, TSV, Parquet or Excel); null: the label of an image is the name of its
    top-level folder in `images`; tags: from the headers of DICOM files, with keywords such as BodyPartExamined in place
    of columns."""
    path_column: Name = "path"
    """Column of `labels` with the path of the image, relative to `images`."""
    tag_columns: TagColumns | None = None
    """DICOM element -> column of `labels` that has its value, in place of paths: {SOPInstanceUID: uid} for a row per
    file, {PatientID: patient} or {PatientID: patient, Laterality: side} for a row that labels all files with these
    values. null: rows have paths."""
    tag_filter: TagFilter | None = None
    """DICOM element -> accepted values, or values that are left out, with a ! in front: {Modality: [CT],
    ImageType: ["!LOCALIZER"]}; files without the element have none of the values. null: all files."""
    label_column: Name = "label"
    """Column of `labels` with the label; with tags, label means BodyPartExamined."""
    label_separator: Word = SEPARATOR
    """Separator of the labels of one image in `label_column`; only for multilabel."""
    label_columns: Names | None = None
    """0/1 columns of `labels`, each named after its label, instead of `label_column`; only for multilabel."""
    group_column: Name | None = "auto"
    """Column of `labels` with the patient (or any unit that must stay in one split); auto: a column named patient,
    subject, case or group (with or without _id), or, without `labels`, the sub-folders of class folders if they hold
    several images each, else PatientID of DICOM files, stored as a keyed hash; folder: always those sub-folders;
    tags: always PatientID; null: each image is its own group."""
    split_column: Name | None = "auto"
    """Column of `labels` with a predefined split (train, val, test); empty entries are filled at random, and if no
    image is in val, validation images are drawn from train; auto: a column named split; null: all splits are random."""
    split_files: SplitFiles | None = None
    """Split -> text file with an image per line, in place of `split_column`: {train: a.txt, val: b.txt, test: c.txt}.
    Images in no list are left out, or are those of a split named rest: {train: a.txt, val: b.txt, test: rest}."""
    site_column: Name | None = None
    """Column of `labels` with the hospital or other site; null: none."""
    test_sites: Names | None = None
    """Sites whose images are the test images, all others being drawn into train and val; null: test images are drawn
    from all sites."""
    keep_columns: tuple[Name, ...] = ()
    """Further columns of `labels` that the manifest keeps, such as [age, sex, scanner]."""
    shots: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Few-shot study: number of patients per class to train on, and as many to validate on; test images stay, all
    others are left out; null: all images."""
    allow_leaks: tuple[Leak, ...] = ()
    """What predefined splits may share without an error: content (identical files), patient (images of one patient or
    other group), near (nearly the same picture; it is then ignored in drawn splits, too)."""
    classes: Names | None = None
    """Labels (or their `class_names`) in the order of the model's outputs; null: sorted by name. Ordinal grades should
    be listed."""
    class_names: ClassNames | None = None
    """Display names of labels, such as {0: healthy, 1: ill}, used from the manifest to the report; null: the labels."""
    unlabelled: Literal["error", "allow"] = "error"
    """Handling of images with a missing label: error (stop and list them) or allow (cache their features and predict
    them, but never train or score on them)."""
    val_share: Share = 0.2
    """Fraction of the images for validation, which selects the best epoch."""
    test_share: Share = 0.2
    """Fraction of the images for the test."""
    seed: Seed = 0
    """Random seed of the split."""
    on_error: Literal["fail", "quarantine"] = "fail"
    """Handling of unreadable images: fail (stop and list them) or quarantine (leave them out and list them in a
    CSV)."""
    on_warning: Literal["error", "accept"] = "error"
    """Handling of images with wrong checksums or corrupt JPEG data: error (as unreadable) or accept (use and count)."""
    max_pixels: Annotated[int, Field(ge=1, le=10**11)] = 250_000_000
    """Images with more pixels are rejected before they are decoded."""
    min_side: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Images with a side shorter than this, in pixels, are rejected."""

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.val_share + self.test_share >= 1.0:
            raise ValueError("val_share + test_share leave no images to train on")
        if len(set(self.allow_leaks)) != len(self.allow_leaks):
            raise ValueError("allow_leaks lists an entry twice")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes lists a label twice")
        if self.labels is None and (
            self.group_column not in (None, "auto", "folder", TAGS) or self.split_column not in (None, "auto")
        ):
            raise ValueError("group_column and split_column need a labels table")
        if self.labels is None and (self.site_column is not None or self.keep_columns):
            raise ValueError("site_column and keep_columns need a labels table")
        if self.labels == TAGS and (self.split_column not in (None, "auto") or self.label_columns is not None):
            raise ValueError("split_column and label_columns need a labels table")
        if self.tag_columns is not None and self.labels_file is None:
            raise ValueError("tag_columns needs a labels table")
        if self.split_files is not None:
            self._check_lists()
        if self.test_sites is not None and self.site_column is None:
            raise ValueError("test_sites needs site_column")
        return self

    def _check_lists(self) -> None:
        names = list((self.split_files or {}).values())
        if self.split_column not in (None, "auto") or self.test_sites is not None:
            raise ValueError("split_files excludes split_column and test_sites")
        if names.count(REST) > 1 or names == [REST]:
            raise ValueError(f"only one split of split_files can be {REST}, next to a list")

    @property
    def labels_file(self) -> str | None:
        """Path of the table with the labels, or None without one."""
        return None if self.labels == TAGS else self.labels

    @field_validator("group_column", "split_column", "site_column", mode="before")
    @classmethod
    def _none_is_null(cls, value: object) -> object:
        return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value

    @field_validator("tag_filter", mode="before")
    @classmethod
    def _single_values(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: tuple(one) if isinstance(one, list | tuple) else (one,) for key, one in value.items()}

    @field_validator("classes", mode="before")
    @classmethod
    def _number_labels(cls, value: object) -> object:
        return tuple(map(_label_text, value)) if isinstance(value, list | tuple) else value

    @field_validator("class_names", mode="before")
    @classmethod
    def _number_names(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {_label_text(label): _label_text(name) for label, name in value.items()}

    @model_validator(mode="after")
    def _check_class_names(self) -> DataSettings:
        names = list((self.class_names or {}).values())
        if len(set(names)) != len(names):
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"class_names gives the name {duplicate!r} to two labels")
        if any(not name.strip() for name in names):
            raise ValueError("class_names contains an empty name")
        if self.task == "multilabel" and any(SEPARATOR in name for name in names):
            raise ValueError(f"class_names may not contain {SEPARATOR!r} with task multilabel")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> DataSettings:
        if self.task == "ordinal" and self.classes is None:
            raise ValueError("task ordinal needs classes: the grades from the lowest to the highest")
        if self.task == "multilabel" and self.labels is None:
            raise ValueError("task multilabel needs a labels table: an image in a class folder has one label")
        if self.label_columns is not None:
            if self.task != "multilabel":
                raise ValueError("label_columns is for task multilabel")
            if len(set(self.label_columns)) != len(self.label_columns):
                raise ValueError("label_columns lists a column twice")
        return self
