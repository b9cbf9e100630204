"""List the images that settings name, with label, group and split: from class folders or from a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import DataError
from schemas.manifest import GroupUnit
from schemas.settings import DataSettings
from schemas.text import counted
from stages.prepare.class_names import name_classes
from stages.prepare.columns import FOLDER, unit_of_column
from stages.prepare.listing import listed
from stages.prepare.patients import groups_spelled_alike
from stages.prepare.scan import Item, check_names, images_folder, scan_folders
from stages.prepare.survey import SUFFIXES, PassedOver
from stages.prepare.table import read_table

STRAY = "lies beside the class folders, so it has no label"
EMPTY = "class folder without any image"


@dataclass(frozen=True)
class Listing:
    """The images of a data set, and what else was found where they were looked for."""

    images: Path
    """Folder that the paths start at."""
    items: list[Item]
    """Sorted by path; labels are the names of `data.class_names`."""
    group_column: str | None = None
    """Column of the groups, "folder" for sub-folders of class folders, or None."""
    split_column: str | None = None
    """Column of the ready splits, or None."""
    notes: list[str] = field(default_factory=list)
    """What was chosen by header or layout, for people."""
    stray: list[str] = field(default_factory=list)
    """Images beside the class folders."""
    empty: dict[str, str] = field(default_factory=dict)
    """Class folder without any image -> what lies in it instead."""
    passed_over: list[PassedOver] = field(default_factory=list)
    """Files and folders in which no image was read."""

    @property
    def unit(self) -> GroupUnit | None:
        """What the groups are called; None: no image has one."""
        if self.group_column is None or all(item.group is None for item in self.items):
            return None
        return "patients" if self.group_column == FOLDER else unit_of_column(self.group_column)

    def set_aside(self) -> list[tuple[Item, str]]:
        """What quarantine sets aside before an image is opened, with the reasons."""
        stray = [(Item(name, ""), STRAY) for name in self.stray]
        return stray + [(Item(f"{name}/", name), f"{EMPTY}: {there}") for name, there in self.empty.items()]

    def problems(self) -> list[str]:
        """Each image without a label and each class folder without images, in one line."""
        return [f"{item.path}: {reason}" for item, reason in self.set_aside()]


def read_listing(data: DataSettings, root: Path) -> Listing:
    """List the images of a data set; no image that its name shows to be one is opened.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.

    Raises:
        DataError: The folder or table is missing, unreadable or malformed. Stray images and empty class folders are
            no error here: `Listing.stray` and `Listing.empty` hold them.
    """
    images = images_folder(data, root)
    if data.labels is None:
        scan = scan_folders(images, data.group_column)
        listing = Listing(
            images, scan.items, scan.group_column, None, scan.notes, scan.stray, scan.empty, scan.passed_over
        )
    else:
        table = read_table(data, root, images)
        listing = Listing(images, table.items, table.group_column, table.split_column, table.notes)
    check_names([*listing.items, *(item for item, _ in listing.set_aside())])
    listing.items[:] = name_classes(listing.items, data)
    listing.notes.extend(groups_spelled_alike(item.group for item in listing.items if item.group is not None))
    return listing


def check_listing(listing: Listing) -> None:
    """Refuse stray images and empty class folders.

    Raises:
        DataError: All of them are listed.
    """
    if listing.problems():
        raise layout_error(listing)


def layout_error(listing: Listing, unreadable: list[tuple[str, str]] | None = None) -> DataError:
    """The error about stray images, empty class folders and images that cannot be used: all at once."""
    stray, empty, bad = len(listing.stray), len(listing.empty), unreadable or []
    counts = [counted(stray, "image") + " beside the class folders, so without a label"] if stray else []
    counts += [counted(empty, "class") + " without any image"] if empty else []
    counts += [counted(len(bad), "image") + " that cannot be used"] if bad else []
    repairs = ["Move stray images into a class folder"] if stray else []
    repairs += [f"add images ({', '.join(sorted(SUFFIXES))}) to empty class folders or remove them"] if empty else []
    repairs += ["repair or remove images that cannot be used"] if bad else []
    text = "; ".join(repairs)
    return DataError(
        f"In {listing.images}: {'; '.join(counts)}.",
        listed([*listing.problems(), *(f"{path}: {reason}" for path, reason in bad)]),
        f"{text[0].upper()}{text[1:]}. Or set data.on_error: quarantine in params.yaml to continue without them.",
    )
