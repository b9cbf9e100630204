"""Which images are whose: the sites of a manifest, or simulated ones."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from schemas.errors import DataError
from schemas.federated import Partition
from schemas.manifest import Manifest
from schemas.text import counted
from stages.groups import ALL_IMAGES, Cluster, manifest_clusters

LEAST_TRAIN = 10
"""Training images that a simulated site gets at least, where there are enough."""
_ATTEMPTS = 1000
"""Dirichlet draws until every site has enough images."""
_LISTED = 5
"""Clusters that a message names."""


def sites_of(manifest: Manifest) -> dict[str, Manifest]:
    """Return the manifest of each site, by the site of each image.

    Raises:
        DataError: If an image has no site, or images of a patient (or copies of an image) are at several sites.
    """
    unknown = [row.path for row in manifest.rows if row.site is None]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'image')} of {len(manifest.rows)} have no site, such as {unknown[0]}.",
            "data.site_column is not set, or its cells are empty.",
            "Set data.site_column in params.yaml and run `fpt prepare`, or simulate sites with --sites.",
        )
    site_of = {row.path: str(row.site) for row in manifest.rows}
    spread = [one for one in manifest_clusters(manifest) if len({site_of[path] for path in one.paths}) > 1]
    if spread:
        names = [f"  {', '.join(f'{path} ({site_of[path]})' for path in one.paths[:3])}" for one in spread[:_LISTED]]
        raise DataError(
            f"{counted(len(spread), 'patient')} with images at several sites.",
            "\n".join(names) + "\nCopies and near-duplicates of an image count as one patient.",
            "Correct data.site_column or the patients in the labels table, then run `fpt prepare`.",
        )
    return _split(manifest, site_of)


def simulate(manifest: Manifest, partition: Partition) -> dict[str, Manifest]:
    """Deal the images of a manifest to simulated sites, complete patients at a time.

    IID: patients in random order, each to the site with the fewest images. Dirichlet: the share of each site in the
    images of a class is drawn from a symmetric Dirichlet distribution (arXiv 1909.06335), again until every site has at
    least `LEAST_TRAIN` training images, or half of an equal share if that is fewer. Seed and contents of the images
    determine the draw, not their names or order.

    Raises:
        DataError: If there are fewer patients in the training split than sites, or no draw gives each site enough.
    """
    clusters = manifest_clusters(manifest)
    train = {row.path for row in manifest.of("train")}
    count = partition.sites
    least = max(1, min(LEAST_TRAIN, len(train) // (2 * count)))
    names = [f"site-{number + 1:0{len(str(count))}d}" for number in range(count)]
    for attempt in range(_ATTEMPTS):
        salt = f"{partition.seed}/{attempt}"
        order = sorted(clusters, key=lambda one: hashlib.sha256(f"{salt}:{one.key}".encode()).hexdigest())
        dealt = _iid(order, count) if partition.alpha is None else _dirichlet(order, partition, salt)
        site_of = {path: names[site] for one, site in dealt for path in one.paths}
        images = Counter(site_of[path] for path in train)
        if all(images[name] >= least for name in names):
            return _split(manifest, site_of)
    raise DataError(
        f"The images cannot be dealt to {counted(count, 'site')}: each needs {counted(least, 'training image')}.",
        "There are too few patients for so many sites, or the concentration is too low.",
        "Use fewer sites (--sites) or a higher concentration (--partition dirichlet:1).",
    )


def _iid(clusters: Sequence[Cluster], sites: int) -> list[tuple[Cluster, int]]:
    """Give each cluster to the site with the fewest images."""
    images, dealt = [0] * sites, []
    for one in clusters:
        site = images.index(min(images))
        images[site] += len(one.paths)
        dealt.append((one, site))
    return dealt


def _dirichlet(clusters: Sequence[Cluster], partition: Partition, salt: str) -> list[tuple[Cluster, int]]:
    """Give the clusters of each class to sites, so that their images have drawn shares."""
    by_class: Mapping[str, list[Cluster]] = defaultdict(list)
    for one in clusters:
        by_class[_class_of(one)].append(one)
    entropy = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big")
    rng, dealt = np.random.default_rng(entropy), []
    for name in sorted(by_class):
        shares = rng.dirichlet([partition.alpha or 0.0] * partition.sites)
        ends, images = np.cumsum(shares) * sum(len(one.paths) for one in by_class[name]), 0
        for one in by_class[name]:
            # The site in whose interval the middle of the cluster lies.
            site = int(np.searchsorted(ends, images + len(one.paths) / 2))
            dealt.append((one, min(site, partition.sites - 1)))
            images += len(one.paths)
    return dealt


def _class_of(cluster: Cluster) -> str:
    """Return the most frequent class of a cluster, the first by name of several; empty without labels."""
    counts = {name: count for name, count in cluster.counts.items() if name != ALL_IMAGES}
    return min(counts, key=lambda name: (-counts[name], name)) if counts else ""


def _split(manifest: Manifest, site_of: Mapping[str, str]) -> dict[str, Manifest]:
    """Return the manifest of each site, sorted by name."""
    return {
        name: manifest.model_copy(
            update={
                "rows": tuple(
                    row.model_copy(update={"site": name}) for row in manifest.rows if site_of[row.path] == name
                )
            }
        )
        for name in sorted(set(site_of.values()))
    }
