"""Assign a split to each image: the one given in its table, else the one it had before, else a drawn one.

All images of a cluster (images of one patient, copies of one image) share a split. In this order:

1. A split given in the table stays. If no image has val, the images in train are divided into train and val.
2. A known image keeps its split. If images of several splits turn out to belong together (because a patient column or
   a copy was added), all move to train if one of them was in train, else to val: an image that a model may have been
   trained or selected on must not become a test image, while moving a test image to train only shrinks the test split.
3. New clusters are dealt so that the splits come closest to their requested shares.

A known image moves in one more case only: a class would be missing in a split, and no new image can fill the gap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from schemas.errors import DataError
from schemas.manifest import SPLITS, GroupUnit, Split
from schemas.settings import DataSettings
from schemas.tasks import Task, names_in
from schemas.text import counted
from stages.groups import Cluster, find_clusters
from stages.prepare.error_text import listed
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.split_history import KnownSplits
from stages.prepare.stratified_split import Placement, draw_splits


def assign_splits(
    items: Sequence[LabelledImage],
    ids: Mapping[str, str],
    classes: Sequence[str],
    data: DataSettings,
    known: KnownSplits,
    unit: GroupUnit | None = None,
) -> dict[str, Split]:
    """Assign a split to every image.

    Args:
        items: Images; those with a given split keep it.
        ids: Path -> content id.
        classes: All class names.
        data: Task, shares and seed.
        known: Splits of earlier draws.
        unit: Kind of the groups, or None if no group is known.

    Returns:
        Path -> split.

    Raises:
        DataError: The table puts a group or a content into two splits, or a class cannot be in every split.
    """
    given = {item.path: item.split for item in items if item.split is not None}
    check_leaks(items, ids, unit)
    has_val = "val" in given.values()
    if len(given) == len(items) and has_val:
        check_gaps(items, classes, data.task)
        return given
    clusters = find_clusters(items, ids, data.task)
    group_of = {item.path: item.group for item in items}
    placements = {}
    for cluster in clusters:
        groups = (group_of[path] for path in cluster.paths)
        before = _leak_free([*known.of_contents(ids[path] for path in cluster.paths)] or known.of_groups(groups))
        from_table = next((given[path] for path in cluster.paths if path in given), None)
        if from_table is None:
            placements[cluster.key] = Placement(before)
        elif from_table == "train" and not has_val:
            placements[cluster.key] = Placement(None if before == "test" else before, ("train", "val"))
        else:
            placements[cluster.key] = Placement(from_table, (from_table,))
    return draw_splits(clusters, data.val_share, data.test_share, data.seed, placements, unit)


def _leak_free(splits: Iterable[Split]) -> Split | None:
    """Return the split that several known images can share without leaking training images into the test split."""
    known = set(splits)
    return next((split for split in SPLITS if split in known), None)


def check_leaks(items: Sequence[LabelledImage], ids: Mapping[str, str], unit: GroupUnit | None = None) -> None:
    """Refuse a table that puts images of one group or content into two splits.

    This includes images that are connected through others, such as a copy of a patient's image under another patient.

    Raises:
        DataError: Lists all such groups.
    """
    noun = (unit or "groups").removesuffix("s")
    splits_by_owner: dict[str, dict[str, Split]] = defaultdict(dict)
    for item in items:
        if item.split is None:
            continue
        splits_by_owner[f"the content of {ids[item.path][:16]}"][item.path] = item.split
        if item.group is not None:
            splits_by_owner[f"{noun} {item.group!r}"][item.path] = item.split
    leaks = [_leak(name, paths) for name, paths in splits_by_owner.items() if len(set(paths.values())) > 1]
    if not leaks:
        given = {item.path: item.split for item in items if item.split is not None}
        clusters = (_given(cluster, given) for cluster in find_clusters(items, ids))
        leaks = [
            _leak(f"images connected with {min(paths)}", paths) for paths in clusters if len(set(paths.values())) > 1
        ]
    if leaks:
        raise DataError(
            f"{counted(len(leaks), 'conflict')} in data.split_column: images that belong together are split up.",
            listed(leaks) + "\nA model would be evaluated on patients or images that it was trained on.",
            "Correct the split column.",
        )


def _given(cluster: Cluster, given: Mapping[str, Split]) -> dict[str, Split]:
    return {path: given[path] for path in cluster.paths if path in given}


def _leak(name: str, paths: Mapping[str, Split]) -> str:
    # Start with one path of each split, which is the conflict.
    first: dict[Split, str] = {}
    for path, split in paths.items():
        first.setdefault(split, path)
    shown = list(dict.fromkeys([*first.values(), *paths]))[:4]
    return f"{name}: " + ", ".join(f"{path} ({paths[path]})" for path in shown)


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
