"""Which split each image gets: the one its table names, else the one it had before, else a drawn one.

All images of a cluster (one patient, copies of one image) share a split, in this order:

1. A split that the table names stays. Where no image has val, the table's train is dealt to train and val.
2. A known image keeps its split. Where images of several splits turn out to belong together (a patient column is new,
   or a copy), all go to train if one of them was there, else to val: what a model may have been trained or chosen on
   must not become a test image, while a test image in train harms nothing but the size of the test.
3. New clusters are dealt, so that the splits come nearest to their shares.

A known image moves for one more reason only: a class would be missing in a split, and no new image can fill the gap.
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
from stages.prepare.listing import listed
from stages.prepare.memory import KnownSplits
from stages.prepare.scan import Item
from stages.prepare.split import Place, draw_splits


def assign_splits(
    items: Sequence[Item],
    ids: Mapping[str, str],
    classes: Sequence[str],
    data: DataSettings,
    known: KnownSplits,
    unit: GroupUnit | None = None,
) -> dict[str, Split]:
    """Give every image a split.

    Args:
        items: Images; those with a split keep it.
        ids: Path -> content.
        classes: All labels.
        data: Task, shares and seed.
        known: Splits of earlier draws.
        unit: What the groups are called; None: no group is known.

    Returns:
        Path -> split.

    Raises:
        DataError: A group or a content is in two splits of the table, or a class cannot be in every split.
    """
    given = {item.path: item.split for item in items if item.split is not None}
    check_leaks(items, ids, unit)
    has_val = "val" in given.values()
    if len(given) == len(items) and has_val:
        check_gaps(items, classes, data.task)
        return given
    clusters = find_clusters(items, ids, data.task)
    group_of = {item.path: item.group for item in items}
    places = {}
    for cluster in clusters:
        groups = (group_of[path] for path in cluster.paths)
        before = _cautious([*known.of_contents(ids[path] for path in cluster.paths)] or known.of_groups(groups))
        named = next((given[path] for path in cluster.paths if path in given), None)
        if named is None:
            places[cluster.key] = Place(before)
        elif named == "train" and not has_val:
            places[cluster.key] = Place(None if before == "test" else before, ("train", "val"))
        else:
            places[cluster.key] = Place(named, (named,))
    return draw_splits(clusters, data.val_share, data.test_share, data.seed, places, unit)


def _cautious(splits: Iterable[Split]) -> Split | None:
    """One split for images of several: the one that harms no later test."""
    found = set(splits)
    return next((split for split in SPLITS if split in found), None)


def check_leaks(items: Sequence[Item], ids: Mapping[str, str], unit: GroupUnit | None = None) -> None:
    """Refuse a group or a content that the table puts into two splits: the test would not be one.

    Images that are joined through others, such as the copy of a patient's image under another patient, count too.

    Raises:
        DataError: All such groups are listed.
    """
    noun = (unit or "groups").removesuffix("s")
    where: dict[str, dict[str, Split]] = defaultdict(dict)
    for item in items:
        if item.split is None:
            continue
        where[f"the content of {ids[item.path][:16]}"][item.path] = item.split
        if item.group is not None:
            where[f"{noun} {item.group!r}"][item.path] = item.split
    leaks = [_leak(name, paths) for name, paths in where.items() if len(set(paths.values())) > 1]
    if not leaks:
        given = {item.path: item.split for item in items if item.split is not None}
        joined = (_given(cluster, given) for cluster in find_clusters(items, ids))
        leaks = [_leak(f"images joined with {min(paths)}", paths) for paths in joined if len(set(paths.values())) > 1]
    if leaks:
        raise DataError(
            f"{counted(len(leaks), 'conflict')} in data.split_column: images that belong together are in two splits.",
            listed(leaks) + "\nA model would be evaluated on patients or images that it was trained on.",
            "Correct the split column.",
        )


def _given(cluster: Cluster, given: Mapping[str, Split]) -> dict[str, Split]:
    return {path: given[path] for path in cluster.paths if path in given}


def _leak(name: str, paths: Mapping[str, Split]) -> str:
    # One path of each split first: they are what is wrong.
    first: dict[Split, str] = {}
    for path, split in paths.items():
        first.setdefault(split, path)
    shown = list(dict.fromkeys([*first.values(), *paths]))[:4]
    return f"{name}: " + ", ".join(f"{path} ({paths[path]})" for path in shown)


def check_gaps(items: Sequence[Item], classes: Sequence[str], task: Task = "multiclass") -> None:
    """Refuse a table whose splits lack a class.

    Raises:
        DataError: All gaps are listed.
    """
    found = {(name, item.split) for item in items for name in names_in(item.label, task)}
    gaps = [f"no {label!r} in {split}" for label in classes for split in SPLITS if (label, split) not in found]
    if gaps:
        raise DataError(
            "data.split_column leaves classes out of a split.",
            listed(gaps),
            "Correct the split column, empty the cells whose split may be drawn, or set data.split_column: null to "
            "have all splits drawn.",
        )
