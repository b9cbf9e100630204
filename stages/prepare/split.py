"""Train, val and test: patients and copies stay together, classes keep their shares.

The unit is a cluster: the images that are joined by a group or by equal content, directly or through others. Clusters
are dealt out one by one, the largest first, so that

    chi2 = sum over columns c and splits s of (x[s, c] - t[s, c])^2 / (t[s, c] * n[c])

grows least, where x counts images, n[c] is their number, t[s, c] = share[s] * n[c], and the columns are the classes
and "any class". Where a class is then missing in a split, the clusters that cost least are moved there.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from schemas.errors import DataError
from schemas.manifest import SPLITS, GroupUnit, Split
from schemas.text import counted
from stages.groups import ALL_IMAGES, Cluster
from stages.prepare.listing import listed

_ATTEMPTS = 20
"""Orders that are tried where groups of several classes make it hard to have every class everywhere."""


@dataclass(frozen=True)
class Place:
    """Where a cluster is, and where it may go."""

    part: str | None = None
    """Where it is already; None: it is dealt."""
    allowed: tuple[str, ...] | None = None
    """Parts that it may be dealt or moved to; None: any."""


def draw_splits(
    clusters: Sequence[Cluster],
    val_share: float,
    test_share: float,
    seed: int,
    places: Mapping[str, Place] | None = None,
    unit: GroupUnit | None = "groups",
) -> dict[str, Split]:
    """Deal clusters to the splits. The same clusters and seed give the same splits, in whatever order they come.

    Args:
        clusters: Of all images.
        val_share: Wanted share of images for validation.
        test_share: Wanted share of images for the test.
        seed: Decides between what is equally good, which is nearly everything where images stand for themselves.
        places: Key of a cluster -> its place, where it is not free.
        unit: What the groups are called in messages; None: each image stands for itself.

    Returns:
        Path -> split.

    Raises:
        DataError: A class cannot be in all three splits.
    """
    _check_enough(clusters, unit)
    shares = {"train": 1.0 - val_share - test_share, "val": val_share, "test": test_share}
    known: dict[str, Split] = {split: split for split in SPLITS}
    repair = (
        "Too few groups hold these classes: set data.seed to another number, add images, or name a ready split with "
        "data.split_column."
    )
    return {path: known[part] for path, part in deal(clusters, shares, f"{seed}", repair, places).items()}


def deal(
    clusters: Sequence[Cluster],
    shares: Mapping[str, float],
    salt: str,
    repair: str,
    places: Mapping[str, Place] | None = None,
) -> dict[str, str]:
    """Deal clusters to any parts. Those that are in a part already move only where a class would be missing else.

    Args:
        clusters: Of all images.
        shares: Part -> wanted share of the images; they sum to one.
        salt: Decides between what is equally good.
        repair: What to do where it cannot be done.
        places: Key of a cluster -> its place, where it is not free.

    Returns:
        Path -> part.

    Raises:
        DataError: A class cannot be in all parts.
    """
    table = _Deal(clusters, shares, places or {})
    some_placed = any(place.part is not None for place in table.places.values())
    for move_placed in (False, True) if some_placed else (False,):
        for attempt in range(_ATTEMPTS):
            table.deal(salt if attempt == 0 else f"{salt}/{attempt}")
            if table.fill_gaps(move_placed):
                return {path: table.split_of[cluster.key] for cluster in clusters for path in cluster.paths}
    *first, last = shares
    raise DataError(
        f"No split was found that keeps groups whole and has every class in {', '.join(first)} and {last}.",
        listed([f"no {label!r} in {part}" for label, part in table.gaps()]),
        repair,
    )


def _check_enough(clusters: Sequence[Cluster], unit: GroupUnit | None) -> None:
    groups: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for cluster in clusters:
        groups.update(cluster.counts.keys())
        images.update(cluster.counts)
    noun = "image" if unit is None else unit.removesuffix("s")

    def size(label: str, number: int) -> str:
        if unit is None:
            return counted(number, "image") + (" without its copies" if number < images[label] else "")
        return f"{counted(images[label], 'image')} of {counted(number, noun)}"

    few = [
        f"{label!r}: {size(label, number)}"
        for label, number in sorted(groups.items())
        if number < len(SPLITS) and label != ALL_IMAGES
    ]
    if few:
        raise DataError(
            f"{counted(len(few), 'class')} with fewer than {len(SPLITS)} {noun}s: too few for train, val and test.",
            listed(few) + "\nImages of one patient (or other group) and copies of an image stay in one split.",
            "Add images, remove the class, or name a ready split with data.split_column.",
        )


_FREE = Place()


@dataclass
class _Deal:
    clusters: Sequence[Cluster]
    shares: Mapping[str, float]
    places: Mapping[str, Place]
    total: dict[str, int] = field(init=False)
    split_of: dict[str, str] = field(init=False)
    have: dict[str, Counter[str]] = field(init=False)
    holders: dict[str, Counter[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.total = dict(_sum(cluster.counts for cluster in self.clusters))

    def deal(self, salt: str) -> None:
        """Give each free cluster to the split where chi2 grows least, the largest clusters first."""
        self.split_of = {}
        self.have = {split: Counter() for split in self.shares}
        self.holders = {split: Counter() for split in self.shares}

        def order(cluster: Cluster) -> tuple[float, str]:
            size = math.fsum(number / self.total[label] for label, number in cluster.counts.items())
            return -size, hashlib.sha256(f"{salt}:{cluster.key}".encode()).hexdigest()

        self.clusters = sorted(self.clusters, key=order)
        for cluster in self.clusters:
            if (part := self._place(cluster).part) is not None:
                self._put(cluster, part)
        for cluster in self.clusters:
            if self._place(cluster).part is None:
                parts = self._place(cluster).allowed or tuple(self.shares)
                # Equally good: the larger share, as it leaves the others more choice. min() keeps the order of parts.
                self._put(cluster, min(parts, key=lambda split: (self._growth(cluster, split), -self.shares[split])))

    def fill_gaps(self, move_placed: bool) -> bool:
        """Bring each class into each split by the moves that cost least; False where one is still missing.

        Args:
            move_placed: Whether clusters that were in a part already may move, if no other can.
        """
        for _ in range(len(self.total) * len(self.shares)):
            gaps = self.gaps()
            if not gaps:
                return True
            label, split = gaps[0]
            donors = [
                cluster
                for cluster in self.clusters
                if label in cluster.counts
                and self._may_leave(cluster, self.split_of[cluster.key])
                and self._may_enter(cluster, split, move_placed)
            ]
            if not donors:
                return False
            self._move(min(donors, key=lambda cluster: (self._unease(cluster), self._change(cluster, split))), split)
        return not self.gaps()

    def gaps(self) -> list[tuple[str, str]]:
        """Each (class, split) without an image, the rarest class first."""
        labels = sorted(self.total, key=lambda label: (self.total[label], label))
        return [(label, split) for label in labels for split in self.shares if not self.holders[split][label]]

    def _growth(self, cluster: Cluster, split: str, held: bool = False) -> float:
        """Growth of chi2 (halved) by the cluster in a split; `held`: it is counted there already.

        Up to a constant, chi2 is the sum of x^2 / (share * n^2): what a cluster of v images adds to it is
        v * (2 x + v) / (share * n^2), where x does not count the cluster.
        """
        have = self.have[split]
        # fsum: the same value in whatever order the labels come.
        return math.fsum(
            number * (have[label] - held * number + number / 2) / self.total[label] ** 2 / self.shares[split]
            for label, number in cluster.counts.items()
        )

    def _change(self, cluster: Cluster, there: str) -> float:
        return self._growth(cluster, there) - self._growth(cluster, self.split_of[cluster.key], held=True)

    def _may_leave(self, cluster: Cluster, split: str) -> bool:
        return all(self.holders[split][label] > 1 for label in cluster.counts)

    def _place(self, cluster: Cluster) -> Place:
        return self.places.get(cluster.key, _FREE)

    def _may_enter(self, cluster: Cluster, split: str, move_placed: bool) -> bool:
        place = self._place(cluster)
        return (move_placed or place.part is None) and (place.allowed is None or split in place.allowed)

    def _unease(self, cluster: Cluster) -> int:
        """Free clusters move first, and those that a model may have been trained on last."""
        part = self._place(cluster).part
        return 0 if part is None else 2 if part == "train" else 1

    def _put(self, cluster: Cluster, split: str) -> None:
        self.split_of[cluster.key] = split
        self.have[split].update(cluster.counts)
        self.holders[split].update(cluster.counts.keys())

    def _move(self, cluster: Cluster, there: str) -> None:
        here = self.split_of[cluster.key]
        self.have[here].subtract(cluster.counts)
        self.holders[here].subtract(cluster.counts.keys())
        self._put(cluster, there)


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total
