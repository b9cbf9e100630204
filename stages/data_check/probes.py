"""Probe whether something other than the finding tells the class: file size, coarse layout, site, format.

Every image is predicted from its nearest neighbours in other clusters (patients, copies), or from the images with the
same value of a column. What chance gives is measured with the labels permuted between clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from schemas.data_check import Probe

NEIGHBOURS = 9
PERMUTATIONS = 399
MAX_IMAGES = 5_000
"""Larger data sets are probed on a sample."""
_BLOCK = 512

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Vote = Callable[[Floats], Floats]
"""Targets (N, C) of zeros and ones -> summed targets of the images that vote on each image (N, C), and a last column
with their number."""


def sample(images: int) -> Ints:
    """Return the positions of the probed images, in random order: ties are not broken by the order of the paths."""
    return np.random.default_rng(0).permutation(images)[:MAX_IMAGES]


def probe_vectors(name: str, vectors: Floats, targets: Floats, clusters: Ints, exclusive: bool) -> Probe:
    """Predict labels by the nearest neighbours of other clusters.

    Args:
        name: Of the probe.
        vectors: (N, D), Euclidean distance; columns are standardised here.
        targets: (N, C) zeros and ones.
        clusters: (N,) number of each image's cluster.
        exclusive: Whether every image has exactly one label.
    """
    spread = vectors.std(axis=0)
    rows = (vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    neighbours = _neighbours(rows, clusters)

    def vote(values: Floats) -> Floats:
        padded = np.concatenate([values, np.zeros((1, values.shape[1]))])
        return np.asarray(padded[neighbours].sum(axis=1))

    return _probe(name, vote, targets, clusters, exclusive)


def probe_column(name: str, values: Sequence[str], targets: Floats, clusters: Ints, exclusive: bool) -> Probe:
    """Predict labels by all images that have the same value in a column.

    Each image votes on itself, too: without it, classes of equal size would predict each other. The permuted labels
    have the same advantage.
    """
    value_of = np.unique(np.asarray(values), return_inverse=True)[1]

    def vote(rows: Floats) -> Floats:
        total = np.zeros((int(value_of.max()) + 1, rows.shape[1]))
        np.add.at(total, value_of, rows)
        return np.asarray(total[value_of])

    return _probe(name, vote, targets, clusters, exclusive)


def _probe(name: str, vote: Vote, targets: Floats, clusters: Ints, exclusive: bool) -> Probe:
    counted = np.concatenate([targets, np.ones((len(targets), 1))], axis=1)
    accuracy = _accuracy(vote(counted), targets, exclusive)
    random = np.random.default_rng(0)
    chance = []
    for _ in range(PERMUTATIONS):
        permuted = targets[_permutation(clusters, random)]
        counted[:, :-1] = permuted
        chance.append(_accuracy(vote(counted), permuted, exclusive))
    low, middle, high = np.quantile(chance, (0.005, 0.5, 0.995))
    return Probe(
        name=name,
        accuracy=accuracy,
        chance=(float(middle), float(low), float(high)),
        images=len(targets),
        suspected=accuracy > max(chance),
    )


def _accuracy(votes: Floats, targets: Floats, exclusive: bool) -> float:
    """Return the balanced accuracy of predictions by votes that are divided by the frequency of each label."""
    share = targets.mean(axis=0)
    fraction = votes[:, :-1] / np.maximum(votes[:, -1:], 1.0)
    if exclusive:
        predicted = (fraction / np.maximum(share, 1e-12)).argmax(axis=1)
        hit = targets[np.arange(len(targets)), predicted]
        present = targets.sum(axis=0) > 0
        return float(((targets * hit[:, None]).sum(axis=0)[present] / targets.sum(axis=0)[present]).mean())
    positive = fraction >= np.maximum(share, 1e-12)
    useful = (share > 0) & (share < 1)
    recall = (positive * targets).sum(axis=0)[useful] / targets.sum(axis=0)[useful]
    spared = (~positive * (1 - targets)).sum(axis=0)[useful] / (1 - targets).sum(axis=0)[useful]
    return float((recall + spared).mean() / 2) if useful.any() else 0.5


def _permutation(clusters: Ints, random: np.random.Generator) -> Ints:
    """Return the image whose label each image gets: clusters pass their labels on, repeated or cut to fit."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    giver = random.permutation(len(starts))
    position = np.arange(len(order)) - np.repeat(starts, sizes)
    source = np.repeat(starts[giver], sizes) + position % np.repeat(sizes[giver], sizes)
    result = np.empty(len(order), np.int64)
    result[order] = order[source]
    return result


def _neighbours(rows: Floats, clusters: Ints) -> Ints:
    """Return the nearest rows of other clusters (N, k); N where there are fewer."""
    count, k = len(rows), min(NEIGHBOURS, len(rows) - 1)
    squares = np.square(rows).sum(axis=1)
    nearest = np.full((count, k), count, np.int64)
    for start in range(0, count, _BLOCK):
        part = slice(start, start + _BLOCK)
        distance = squares[None, :] - 2 * rows[part] @ rows.T
        distance[clusters[part, None] == clusters[None, :]] = np.inf
        chosen = np.argpartition(distance, k - 1, axis=1)[:, :k]
        usable = np.isfinite(np.take_along_axis(distance, chosen, axis=1))
        nearest[part] = np.where(usable, chosen, count)
    return nearest
