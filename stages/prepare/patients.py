"""Patients: whether sub-folders of class folders are some, and names that may be one patient."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from schemas.errors import DataError
from schemas.text import counted
from stages.prepare.columns import AUTO, split_of_word
from stages.prepare.listing import listed

_SHOWN = 5
"""Pairs of similar names that a warning lists."""
_LEAST = 3
"""Sub-folders of a class: fewer cannot be patients of three splits."""


def patient_folders(
    paths: Mapping[str, Sequence[str]], images: Path, group_column: str | None
) -> tuple[dict[str, str], list[str]]:
    """Which second-level folder each image belongs to, if those folders are patients.

    Sub-folders of one name in several classes are one patient: splitting one patient would be worse than joining two.

    Args:
        paths: Class -> paths of its images, relative to `images`.
        images: Folder of the class folders.
        group_column: As `data.group_column`. With "auto" the sub-folders are patients if some holds several images,
            every image is in one, and each class has at least three.

    Returns:
        Path -> patient, empty where images stand for themselves; and lines for people.

    Raises:
        DataError: With "auto", sub-folders hold several images but are not clearly patients.
    """
    folder_of = {
        path: parts[1].strip() for every in paths.values() for path in every if len(parts := path.split("/")) > 2
    }
    sizes = Counter(folder_of.values())
    crowded = {name: number for name, number in sizes.items() if number > 1}
    if group_column is not None and group_column != AUTO:
        return folder_of, [_chosen(images, len(sizes))] if sizes else []
    if not crowded:
        return {}, []
    if group_column is None:
        example = max(crowded, key=lambda name: crowded[name])
        return {}, [
            f"{counted(len(crowded), 'sub-folder')} of the class folders hold several images each, such as {example!r} "
            "(data.group_column: null): images of one sub-folder may be in two splits."
        ]
    doubts = _doubts(paths, folder_of)
    if doubts:
        most = sorted(crowded, key=lambda name: (-crowded[name], name))[:3]
        examples = ", ".join(f"{name!r}: {crowded[name]:,}" for name in most)
        raise DataError(
            f"Sub-folders of the class folders in {images} hold several images each ({examples}); whether they are "
            "patients is not clear.",
            listed(doubts) + "\nImages of one patient have to stay in one split.",
            "Set data.group_column in params.yaml: folder (each sub-folder is a patient), or null (each image stands "
            "for itself); or name a CSV with a patient column with data.labels.",
        )
    return folder_of, [_chosen(images, len(sizes))]


def _chosen(images: Path, number: int) -> str:
    return (
        f"The sub-folders of the class folders in {images.name} are taken as {counted(number, 'patient')}, each of "
        "which stays in one split."
    )


def _doubts(paths: Mapping[str, Sequence[str]], folder_of: Mapping[str, str]) -> list[str]:
    """What speaks against sub-folders being patients."""
    doubts = []
    if all(split_of_word(name) for name in folder_of.values()):
        doubts.append("their names are those of splits")
    for label, every in paths.items():
        direct = sum(path not in folder_of for path in every)
        if direct:
            lie = "lies" if direct == 1 else "lie"
            doubts.append(f"{counted(direct, 'image')} of {label!r} {lie} in no sub-folder")
        number = len({folder_of[path] for path in every if path in folder_of})
        if 0 < number < _LEAST:
            doubts.append(f"{label!r} has only {counted(number, 'sub-folder')}")
    return doubts


def groups_spelled_alike(groups: Iterable[str]) -> list[str]:
    """Warn of groups whose names differ only in capitals or blanks: one patient may then be in two splits."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in groups:
        spellings["".join(name.split()).casefold()].add(name)
    alike = [sorted(names) for names in spellings.values() if len(names) > 1]
    if not alike:
        return []
    shown = "; ".join(" and ".join(map(repr, names)) for names in alike[:_SHOWN])
    more = f"; and {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
    return [
        f"Warning: these patients or groups differ only in capitals or blanks and count as different: {shown}{more}. "
        "Correct the table if they are the same."
    ]
