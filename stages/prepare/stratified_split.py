"""Divide images into train, val and test: patients and copies stay together, classes keep their shares.

The unit is a cluster: images connected by a group or by equal content, directly or through others. Clusters are dealt
one by one in order of decreasing size, each to the split in which

    chi2 = sum over columns c and splits s of (x[s, c] - t[s, c])^2 / (t[s, c] * n[c])

grows least. The columns are the classes and "any class", x[s, c] is the number of images of column c in split s, n[c]
the number of images of column c, and t[s, c] = share[s] * n[c]. If a class is then missing in a split, the clusters
whose move increases chi2 least are moved there.
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
from stages.prepare.error_text import listed

# scikit-learn's StratifiedGroupKFold does not replace this module: it deals all groups at once, so that known images
# would not keep their split and adding images would move others; it has equal folds instead of shares, labels that
# exclude each other, and no guarantee that every class occurs in every fold.
_ATTEMPTS = 20
"""Dealing orders to try before giving up, for groups with several classes that rarely allow every class everywhere."""


@dataclass(frozen=True)
class Placement:
    """Current split of a cluster, and the splits that it may be in."""

    current: str | None = None
    """Split that the cluster is in already, or None if it is to be dealt."""
    allowed: tuple[str, ...] | None = None
    """Splits that it may be dealt or moved to, or None for any."""


def draw_splits(
    clusters: Sequence[Cluster],
    val_share: float,
    test_share: float,
    seed: int,
    placements: Mapping[str, Placement] | None = None,
    unit: GroupUnit | None = "groups",
) -> dict[str, Split]:
    """Deal clusters to the splits. The same clusters and seed give the same splits, regardless of their order.

    Args:
        clusters: Clusters of all images.
        val_share: Target share of images for validation.
        test_share: Target share of images for the test.
        seed: Breaks ties, which decide almost everything if no groups are known.
        placements: Cluster key -> placement, for clusters that are not free.
        unit: Name of the groups in messages, or None if no groups are known.

    Returns:
        Path -> split.

    Raises:
        DataError: A class cannot be in all three splits.
    """
    _check_enough(clusters, unit)
    shares = {"train": 1.0 - val_share - test_share, "val": val_share, "test": test_share}
    by_name: dict[str, Split] = {split: split for split in SPLITS}
    repair = (
        "Too few groups have these classes: set data.seed to another number, add images, or provide a split with "
        "data.split_column."
    )
    return {path: by_name[name] for path, name in deal(clusters, shares, f"{seed}", repair, placements).items()}


def deal(
    clusters: Sequence[Cluster],
    shares: Mapping[str, float],
    salt: str,
    repair: str,
    placements: Mapping[str, Placement] | None = None,
) -> dict[str, str]:
    """Deal clusters to splits or folds. Those with a current split move only if a class would otherwise be missing.

    Args:
        clusters: Clusters of all images.
        shares: Split -> target share of the images; the shares sum to one.
        salt: Breaks ties.
        repair: Advice in the error message.
        placements: Cluster key -> placement, for clusters that are not free.

    Returns:
        Path -> split.

    Raises:
        DataError: A class cannot be in all splits.
    """
    dealing = _Dealing(clusters, shares, placements or {})
    some_placed = any(placement.current is not None for placement in dealing.placements.values())
    for move_placed in (False, True) if some_placed else (False,):
        for attempt in range(_ATTEMPTS):
            dealing.deal(salt if attempt == 0 else f"{salt}/{attempt}")
            if dealing.fill_gaps(move_placed):
                return {path: dealing.split_of[cluster.key] for cluster in clusters for path in cluster.paths}
    *first, last = shares
    raise DataError(
        f"No split was found that keeps groups together and has every class in {', '.join(first)} and {last}.",
        listed([f"no {label!r} in {split}" for label, split in dealing.gaps()]),
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
            return counted(number, "image") + (" without duplicates" if number < images[label] else "")
        return f"{counted(images[label], 'image')} of {counted(number, noun)}"

    few = [
        f"{label!r}: {size(label, number)}"
        for label, number in sorted(groups.items())
        if number < len(SPLITS) and label != ALL_IMAGES
    ]
    if few:
        raise DataError(
            f"{counted(len(few), 'class')} with fewer than {len(SPLITS)} {noun}s: too few for train, val and test.",
            listed(few)
            + "\nImages of one patient (or other group), copies and near-duplicates stay in the same split.",
            "Add images, remove the class, or provide a split with data.split_column.",
        )


_FREE = Placement()


@dataclass
class _Dealing:
    clusters: Sequence[Cluster]
    shares: Mapping[str, float]
    placements: Mapping[str, Placement]
    total: dict[str, int] = field(init=False)
    """Column -> images."""
    split_of: dict[str, str] = field(init=False)
    """Cluster key -> split."""
    images: dict[str, Counter[str]] = field(init=False)
    """Split -> column -> images."""
    clusters_with: dict[str, Counter[str]] = field(init=False)
    """Split -> column -> clusters that contain it."""

    def __post_init__(self) -> None:
        self.total = dict(_sum(cluster.counts for cluster in self.clusters))

    def deal(self, salt: str) -> None:
        """Deal each free cluster to the split where chi2 grows least, in order of decreasing size."""
        self.split_of = {}
        self.images = {split: Counter() for split in self.shares}
        self.clusters_with = {split: Counter() for split in self.shares}

        def order(cluster: Cluster) -> tuple[float, str]:
            size = math.fsum(number / self.total[label] for label, number in cluster.counts.items())
            return -size, hashlib.sha256(f"{salt}:{cluster.key}".encode()).hexdigest()

        self.clusters = sorted(self.clusters, key=order)
        for cluster in self.clusters:
            if (current := self._placement(cluster).current) is not None:
                self._put(cluster, current)
        for cluster in self.clusters:
            if self._placement(cluster).current is None:
                allowed = self._placement(cluster).allowed or tuple(self.shares)
                # Ties go to the larger share, which leaves more choice later, then to the first in order (by min).
                self._put(cluster, min(allowed, key=lambda split: (self._growth(cluster, split), -self.shares[split])))

    def fill_gaps(self, move_placed: bool) -> bool:
        """Bring each class into each split by the moves that increase chi2 least; False if a class is still missing.

        Args:
            move_placed: Whether clusters with a current split may move, if no other can.
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
            self._move(
                min(donors, key=lambda cluster: (self._reluctance(cluster), self._change(cluster, split))), split
            )
        return not self.gaps()

    def gaps(self) -> list[tuple[str, str]]:
        """Return each (class, split) without an image, in order of increasing class size."""
        labels = sorted(self.total, key=lambda label: (self.total[label], label))
        return [(label, split) for label in labels for split in self.shares if not self.clusters_with[split][label]]

    def _growth(self, cluster: Cluster, split: str, included: bool = False) -> float:
        """Return half the growth of chi2 due to a cluster in a split.

        Up to a constant, chi2 is the sum of x^2 / (share * n^2). A cluster of v images adds
        v * (2 x + v) / (share * n^2) to it, where x does not count the cluster. `included` means that the images of
        the cluster are already counted in the split.
        """
        images = self.images[split]
        # fsum gives the same value for any order of the labels.
        return math.fsum(
            number * (images[label] - included * number + number / 2) / self.total[label] ** 2 / self.shares[split]
            for label, number in cluster.counts.items()
        )

    def _change(self, cluster: Cluster, there: str) -> float:
        return self._growth(cluster, there) - self._growth(cluster, self.split_of[cluster.key], included=True)

    def _may_leave(self, cluster: Cluster, split: str) -> bool:
        return all(self.clusters_with[split][label] > 1 for label in cluster.counts)

    def _placement(self, cluster: Cluster) -> Placement:
        return self.placements.get(cluster.key, _FREE)

    def _may_enter(self, cluster: Cluster, split: str, move_placed: bool) -> bool:
        placement = self._placement(cluster)
        return (move_placed or placement.current is None) and (placement.allowed is None or split in placement.allowed)

    def _reluctance(self, cluster: Cluster) -> int:
        """Rank for moving: free clusters first, those that a model may have been trained on last."""
        current = self._placement(cluster).current
        return 0 if current is None else 2 if current == "train" else 1

    def _put(self, cluster: Cluster, split: str) -> None:
        self.split_of[cluster.key] = split
        self.images[split].update(cluster.counts)
        self.clusters_with[split].update(cluster.counts.keys())

    def _move(self, cluster: Cluster, there: str) -> None:
        here = self.split_of[cluster.key]
        self.images[here].subtract(cluster.counts)
        self.clusters_with[here].subtract(cluster.counts.keys())
        self._put(cluster, there)


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for cluster_counts in counts:
        total.update(cluster_counts)
    return total
