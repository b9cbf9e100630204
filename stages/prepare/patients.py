"""Recognise patients: sub-folders of class folders, and different spellings of one patient."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from schemas.data_settings import TAGS
from schemas.errors import DataError
from schemas.text import counted
from stages.prepare.error_text import listed
from stages.prepare.table_columns import AUTO, split_of_word

_SHOWN = 5
"""Number of similar names that a warning lists."""
_MIN_PER_CLASS = 3
"""Sub-folders per class; fewer patients cannot be in all three splits."""


def patient_folders(
    paths: Mapping[str, Sequence[str]], images: Path, group_column: str | None
) -> tuple[dict[str, str], list[str]]:
    """Return the patient of each image if second-level folders are patients.

    Sub-folders with the same name in several classes count as one patient: splitting a patient would be worse than
    merging two.

    Args:
        paths: Class -> paths of its images, relative to `images`.
        images: Folder of the class folders.
        group_column: `data.group_column`. With "auto" the sub-folders are patients if at least one contains several
            images, every image is in one, and each class has at least three.

    Returns:
        Path -> patient, empty if sub-folders are not patients; and notes for the user.

    Raises:
        DataError: With "auto", sub-folders contain several images but are not clearly patients.
    """
    folder_of = {
        path: parts[1].strip() for every in paths.values() for path in every if len(parts := path.split("/")) > 2
    }
    sizes = Counter(folder_of.values())
    crowded = {name: number for name, number in sizes.items() if number > 1}
    if group_column == TAGS:
        return {}, []
    if group_column is not None and group_column != AUTO:
        return folder_of, [_chosen(images, len(sizes))] if sizes else []
    if not crowded:
        return {}, []
    if group_column is None:
        example = max(crowded, key=lambda name: crowded[name])
        return {}, [
            f"{counted(len(crowded), 'sub-folder')} of the class folders contain several images each, such as "
            f"{example!r} (data.group_column: null): images of one sub-folder may be in different splits."
        ]
    doubts = _doubts(paths, folder_of)
    if doubts:
        most = sorted(crowded, key=lambda name: (-crowded[name], name))[:3]
        examples = ", ".join(f"{name!r}: {crowded[name]:,}" for name in most)
        raise DataError(
            f"Sub-folders of the class folders in {images} contain several images each ({examples}); it is "
            "unclear whether they are patients.",
            listed(doubts) + "\nImages of one patient have to stay in the same split.",
            "Set data.group_column in params.yaml: folder (each sub-folder is a patient), tags (PatientID of DICOM "
            "files), or null (images are independent); or set data.labels to a CSV with a patient column.",
        )
    return folder_of, [_chosen(images, len(sizes))]


def _chosen(images: Path, number: int) -> str:
    return (
        f"The sub-folders of the class folders in {images.name} count as {counted(number, 'patient')}; all images of a "
        "patient stay in one split."
    )


def _doubts(paths: Mapping[str, Sequence[str]], folder_of: Mapping[str, str]) -> list[str]:
    """List the evidence against sub-folders being patients."""
    doubts = []
    if all(split_of_word(name) for name in folder_of.values()):
        doubts.append("they are named like splits")
    for label, every in paths.items():
        direct = sum(path not in folder_of for path in every)
        if direct:
            are = "is" if direct == 1 else "are"
            doubts.append(f"{counted(direct, 'image')} of {label!r} {are} in no sub-folder")
        number = len({folder_of[path] for path in every if path in folder_of})
        if 0 < number < _MIN_PER_CLASS:
            doubts.append(f"{label!r} has only {counted(number, 'sub-folder')}")
    return doubts


def groups_spelled_alike(groups: Iterable[str]) -> list[str]:
    """Warn of groups whose names differ only in case, blanks or leading zeros: one patient could be in two splits."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in groups:
        # Spreadsheets take 007 for the number 7.
        spellings["".join(name.split()).casefold().lstrip("0")].add(name)
    alike = [sorted(names) for names in spellings.values() if len(names) > 1]
    if not alike:
        return []
    shown = "; ".join(" and ".join(map(repr, names)) for names in alike[:_SHOWN])
    more = f"; and {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
    return [
        "Warning: these patients or groups differ only in case, blanks or leading zeros and count as different: "
        f"{shown}{more}. Correct the table if they are the same."
    ]
