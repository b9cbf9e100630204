"""List the images that settings name, with label, group and split: from class folders or from a table."""

from __future__ import annotations

from pathlib import Path

from schemas.settings import DataSettings
from stages.prepare.scan import Item, check_names, images_folder, scan_folders
from stages.prepare.table import read_table


def list_items(data: DataSettings, root: Path) -> tuple[Path, list[Item]]:
    """List the images of a data set; no image file is opened.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.

    Returns:
        Folder that the paths start at, and the images sorted by path.

    Raises:
        DataError: The folder or table is missing, unreadable or malformed.
    """
    images = images_folder(data, root)
    items = scan_folders(images) if data.labels is None else read_table(data, root, images)
    check_names(items)
    return images, items
