"""List the images of a data set with label, group and split, from class folders or from a table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from schemas.data_settings import TAGS, DataSettings
from schemas.errors import DataError
from schemas.manifest import GroupUnit
from schemas.text import counted
from stages.prepare.class_folders import check_names, images_folder, scan_folders
from stages.prepare.class_names import name_classes
from stages.prepare.error_text import listed
from stages.prepare.held_out_sites import hold_out_sites
from stages.prepare.image_files import SUFFIXES, SkippedFile
from stages.prepare.label_table import read_table
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.patients import groups_spelled_alike
from stages.prepare.pseudonyms import study_key
from stages.prepare.split_lists import split_by_lists
from stages.prepare.table_columns import AUTO, FOLDER, unit_of_column

STRAY = "outside of the class folders, so it has no label"
EMPTY = "class folder without images"
_OTHER_LABELS = (
    "name another element with data.label_column, or a table with data.labels, whose rows data.tag_columns matches "
    "with patients, studies or files"
)


@dataclass(frozen=True)
class Listing:
    """The images of a data set, and the other contents of their folder."""

    images: Path
    """Image folder, to which paths are relative."""
    items: list[LabelledImage]
    """Sorted by path; labels are already renamed by `data.class_names`."""
    group_column: str | None = None
    """Column with the groups, "folder" for sub-folders of class folders, "tags" for PatientID of headers, or None."""
    split_column: str | None = None
    """Column with predefined splits, or None."""
    notes: list[str] = field(default_factory=list)
    """Choices made from the header or the layout, as lines for the user."""
    stray: list[str] = field(default_factory=list)
    """Names of images outside of the class folders."""
    unlabelled: list[LabelledImage] = field(default_factory=list)
    """Images without a label, where `data.unlabelled` allows them; sorted by path, with an empty label and no split."""
    missing_labels: dict[str, str] = field(default_factory=dict)
    """Path of any other image whose header has no label -> reason."""
    unmatched: dict[str, str] = field(default_factory=dict)
    """Row of a table, such as "line 7", of which there is no DICOM file -> reason."""
    empty: dict[str, str] = field(default_factory=dict)
    """Class folder without images -> description of what it contains instead."""
    skipped: list[SkippedFile] = field(default_factory=list)
    """Files that were not read as images."""

    @property
    def every(self) -> list[LabelledImage]:
        """Images with and without a label, sorted by path."""
        return sorted((*self.items, *self.unlabelled), key=lambda item: item.path)

    @property
    def unit(self) -> GroupUnit | None:
        """Kind of the groups, or None if no image has one."""
        if self.group_column is None or all(item.group is None for item in self.every):
            return None
        return "patients" if self.group_column in (FOLDER, TAGS) else unit_of_column(self.group_column)

    def set_aside(self) -> list[tuple[LabelledImage, str]]:
        """Entries that quarantine excludes before any image is opened, with the reasons."""
        stray = [(LabelledImage(name, ""), STRAY) for name in self.stray]
        stray += [(LabelledImage(path, ""), reason) for path, reason in self.missing_labels.items()]
        stray += [(LabelledImage(row, ""), reason) for row, reason in self.unmatched.items()]
        return stray + [
            (LabelledImage(f"{name}/", name), f"{EMPTY}: {contents}") for name, contents in self.empty.items()
        ]

    def problems(self) -> list[str]:
        """One line for each image without a label and each class folder without images."""
        return [f"{item.path}: {reason}" for item, reason in self.set_aside()]


def read_listing(data: DataSettings, root: Path, private: Path | None = None) -> Listing:
    """List the images of a data set. Files with the suffix of an image are not opened, except for their headers.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.
        private: The study's folder `.fpt`, for the key of pseudonyms; None: pseudonyms that differ at each call.

    Raises:
        DataError: The folder or table is missing, unreadable or malformed. Stray images and empty class folders do not
            raise: they are in `Listing.stray` and `Listing.empty`.
    """
    images = images_folder(data, root)
    if data.labels is None:
        scan = scan_folders(images, data.group_column)
        allowed = data.unlabelled == "allow"
        listing = Listing(images, scan.items, scan.group_column, None, scan.notes, [] if allowed else scan.stray)
        listing.unlabelled.extend(LabelledImage(name, "") for name in scan.stray if allowed)
        listing.empty.update(scan.empty)
        listing.skipped.extend(scan.skipped)
    elif data.labels == TAGS:
        # Imported late, with the package that reads DICOM files.
        from stages.prepare.tag_labels import scan_tags

        tags = scan_tags(data, images, study_key(private))
        listing = Listing(images, tags.items, tags.group_column, None, tags.notes, [], tags.unlabelled)
        listing.missing_labels.update(tags.missing_labels)
        listing.skipped.extend(tags.skipped)
    else:
        table = read_table(data, root, images)
        listing = Listing(images, table.items, table.group_column, table.split_column, table.notes)
        listing.unlabelled.extend(table.unlabelled)
        listing.unmatched.update(table.unmatched)
        listing.skipped.extend(table.skipped)
    if data.tag_filter is not None and data.labels != TAGS and data.tag_columns is None:
        _leave_out(listing, data)
    if listing.group_column is None and data.labels != TAGS and data.group_column in (AUTO, TAGS):
        listing = _with_patients(listing, private)
    check_names([*listing.every, *(item for item, _ in listing.set_aside())])
    listing.items[:] = hold_out_sites(name_classes(listing.items, data), data)
    if data.split_files is not None:
        lists = split_by_lists(listing.items, listing.unlabelled, data, root)
        listing.items[:] = lists.items
        listing.notes.extend(lists.notes)
    listing.notes.extend(groups_spelled_alike(item.group for item in listing.every if item.group is not None))
    return listing


def _with_patients(listing: Listing, private: Path | None) -> Listing:
    """Group DICOM files by the PatientID of their headers; files with the suffix of another format are not opened."""
    others = [item.path for item in listing.every if Path(item.path).suffix.lower() not in SUFFIXES]
    if not others:
        return listing
    from stages.prepare.tag_labels import patients_of_headers

    patients, notes = patients_of_headers(others, listing.images, private)
    for images in (listing.items, listing.unlabelled):
        images[:] = [replace(item, group=patients.get(item.path)) for item in images]
    return replace(listing, group_column=TAGS if patients else None, notes=[*listing.notes, *notes])


def _leave_out(listing: Listing, data: DataSettings) -> None:
    """Leave out the DICOM files that `data.tag_filter` does not accept."""
    from stages.prepare.tag_labels import files_that_pass

    passed, notes = files_that_pass([item.path for item in listing.every], listing.images, data)
    for images in (listing.items, listing.unlabelled):
        images[:] = [item for item in images if item.path in passed]
    listing.notes.extend(notes)


def check_listing(listing: Listing) -> None:
    """Refuse images without a label and empty class folders.

    Raises:
        DataError: Lists all of them.
    """
    if listing.problems():
        raise layout_error(listing)


def layout_error(listing: Listing, unreadable: list[tuple[str, str]] | None = None) -> DataError:
    """Return one error for all images without a label, empty class folders and unusable images."""
    stray, empty, unusable = len(listing.stray), len(listing.empty), unreadable or []
    unlabelled, unmatched = len(listing.missing_labels), len(listing.unmatched)
    counts = [counted(stray, "image") + " outside of the class folders, so without a label"] if stray else []
    counts += [counted(unlabelled, "image") + " without a label in the header"] if unlabelled else []
    counts += [counted(unmatched, "row") + " of the table without a DICOM file"] if unmatched else []
    counts += [counted(empty, "class") + " without images"] if empty else []
    counts += [counted(len(unusable), "image") + " that cannot be used"] if unusable else []
    repairs = ["Move stray images into a class folder"] if stray else []
    repairs += [_OTHER_LABELS] if unlabelled else []
    repairs += ["correct data.tag_columns or the table, or remove these rows"] if unmatched else []
    repairs += [f"add images ({', '.join(sorted(SUFFIXES))}) to empty class folders or remove them"] if empty else []
    repairs += ["repair or remove images that cannot be used"] if unusable else []
    repair = "; ".join(repairs)
    return DataError(
        f"In {listing.images}: {'; '.join(counts)}.",
        listed([*listing.problems(), *(f"{path}: {reason}" for path, reason in unusable)]),
        f"{repair[0].upper()}{repair[1:]}. Or set data.on_error: quarantine in params.yaml to continue without them"
        + (
            ", or data.unlabelled: allow to keep images without a label for prediction." if stray or unlabelled else "."
        ),
    )
