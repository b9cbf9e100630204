"""Assign a split to each image: the one given in its table, else the one it had before, else a drawn one.

All images of a cluster (images of one patient, copies of one image, near-duplicates) share a split. In this order:

1. A split given in the table stays, and so do test images by their site. If no image has val, the images in train are
   divided into train and val.
2. A known image keeps its split. If images of several splits turn out to belong together (because a patient column or
   a copy was added), all move to train if one of them was in train, else to val: an image that a model may have been
   trained or selected on must not become a test image, while moving a test image to train only shrinks the test split.
3. New clusters are dealt so that the splits come closest to their requested shares.

A known image moves in one more case only: a class would be missing in a split, and no new image can fill the gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import SPLITS, GroupUnit, Split
from schemas.tasks import Task, names_in
from stages.groups import find_clusters
from stages.prepare.error_text import listed
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.leaks import check_leaks
from stages.prepare.near_duplicates import NO_NEAR, NearDuplicates
from stages.prepare.split_history import KnownSplits
from stages.prepare.stratified_split import Placement, draw_splits


def assign_splits(
    items: Sequence[LabelledImage],
    ids: Mapping[str, str],
    classes: Sequence[str],
    data: DataSettings,
    known: KnownSplits,
    unit: GroupUnit | None = None,
    near: NearDuplicates = NO_NEAR,
    unlabelled: Sequence[LabelledImage] = (),
) -> dict[str, Split]:
    """Assign a split to every image.

    Args:
        items: Images; those with a given split keep it.
        ids: Path -> content id.
        classes: All class names.
        data: Task, shares and seed.
        known: Splits of earlier draws.
        unit: Kind of the groups, or None if no group is known.
        near: Near-duplicates; ignored if `data.allow_leaks` has near.
        unlabelled: Images that get no split, but join those of their patient, their copies and near-duplicates.

    Returns:
        Path -> split.

    Raises:
        DataError: The splits of the table leak, or a class cannot be in every split.
    """
    given = {item.path: item.split for item in items if item.split is not None}
    leaks = check_leaks([*items, *unlabelled], ids, near, unit, data.allow_leaks)
    has_val = "val" in given.values()
    if len(given) == len(items) and has_val:
        check_gaps(items, classes, data.task)
        return given
    near_of = {} if "near" in data.allow_leaks else near.key_of
    clusters = find_clusters(items, ids, data.task, near_of, unlabelled)
    group_of = {item.path: item.group for item in items}
    placements = {}
    for cluster in clusters:
        groups = (group_of[path] for path in cluster.paths)
        before = _leak_free([*known.of_contents(ids[path] for path in cluster.paths)] or known.of_groups(groups))
        from_table = _leak_free(given[path] for path in cluster.paths if path in given)
        if from_table is None and data.test_sites is None:
            placements[cluster.key] = Placement(before)
        elif from_table is None or (from_table == "train" and not has_val):
            placements[cluster.key] = Placement(None if before == "test" else before, ("train", "val"))
        else:
            placements[cluster.key] = Placement(from_table, (from_table,))
    drawn = draw_splits(clusters, data.val_share, data.test_share, data.seed, placements, unit)
    if not leaks:
        return drawn
    # Images of one cluster have several splits, as the settings allow.
    drawn |= {path: split for path, split in given.items() if has_val or split != "train"}
    check_gaps([replace(item, split=drawn[item.path]) for item in items], classes, data.task)
    return drawn


def _leak_free(splits: Iterable[Split]) -> Split | None:
    """Return the split that several known images can share without leaking training images into the test split."""
    known = set(splits)
    return next((split for split in SPLITS if split in known), None)


def check_gaps(items: Sequence[LabelledImage], classes: Sequence[str], task: Task = "multiclass") -> None:
    """Refuse a table that leaves a class without images in some split.

    Raises:
        DataError: Lists all gaps.
    """
    present = {(name, item.split) for item in items for name in names_in(item.label, task)}
    gaps = [f"no {label!r} in {split}" for label in classes for split in SPLITS if (label, split) not in present]
    if gaps:
        raise DataError(
            "With the splits of data.split_column, classes are missing in a split.",
            listed(gaps),
            "Correct the split column, clear the cells of images whose split may be drawn, or set "
            "data.split_column: null to draw all splits.",
        )
