"""Find clusters of images that must share a split: images of one patient or other group, copies, near-duplicates."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from schemas.manifest import Manifest
from schemas.tasks import Task, names_in

ALL_IMAGES = ""
"""Key of the total in `Cluster.counts`; no label is empty."""


class Grouped(Protocol):
    """An image with a label and an optional group."""

    @property
    def path(self) -> str:
        """Unique among the images."""

    @property
    def label(self) -> str:
        """In the notation of manifests."""

    @property
    def group(self) -> str | None:
        """Patient or other group, or None if unknown."""


@dataclass(frozen=True)
class Cluster:
    """Images that must share a split."""

    key: str
    """Smallest content id, which depends neither on file names nor on order."""
    paths: tuple[str, ...]
    """Paths of its images."""
    counts: Mapping[str, int]
    """Label -> number of images, and `ALL_IMAGES` -> total."""


class _Row(NamedTuple):
    path: str
    label: str
    group: str | None


def find_clusters(
    items: Sequence[Grouped],
    ids: Mapping[str, str],
    task: Task = "multiclass",
    near: Mapping[str, str] | None = None,
    links: Sequence[Grouped] = (),
) -> list[Cluster]:
    """Join images that share a group, a content or a set of near-duplicates, directly or through others.

    Args:
        items: Images.
        ids: Path -> content id.
        task: Task of the study; a multi-label image counts for each of its labels.
        near: Path -> key of its set of near-duplicates, for images that have any.
        links: Images that join others, but are in no cluster themselves: those without a label.

    Returns:
        The clusters (connected components), in the order of their first images.
    """
    members: dict[int, list[Grouped]] = defaultdict(list)
    # Those of the links, at the end, are left out.
    for item, component in zip(items, _components([*items, *links], ids, near or {}), strict=False):
        members[component].append(item)
    return [
        Cluster(
            key=min(ids[item.path] for item in cluster),
            paths=tuple(item.path for item in cluster),
            counts=_counts(cluster, task),
        )
        for cluster in members.values()
    ]


def _counts(cluster: Sequence[Grouped], task: Task) -> dict[str, int]:
    if len(cluster) == 1:
        # Most clusters of a large study; a Counter takes ten times as long.
        return {**dict.fromkeys(names_in(cluster[0].label, task), 1), ALL_IMAGES: 1}
    return {**Counter(name for item in cluster for name in names_in(item.label, task)), ALL_IMAGES: len(cluster)}


def _components(items: Sequence[Grouped], ids: Mapping[str, str], near: Mapping[str, str]) -> Sequence[int]:
    """Return the number of the connected component of each image."""
    nodes: dict[tuple[str, str], int] = {}
    contents = [nodes.setdefault(("content", ids[item.path]), len(nodes)) for item in items]
    groups = [
        content if item.group is None else nodes.setdefault(("group", item.group), len(nodes))
        for item, content in zip(items, contents, strict=True)
    ]
    sets = [
        nodes.setdefault(("near", near[item.path]), len(nodes)) if item.path in near else content
        for item, content in zip(items, contents, strict=True)
    ]
    if contents == groups == sets:
        return contents
    # Imported late: 0.2 s of processor time that a study without groups does not need.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array(([1] * 2 * len(items), (contents * 2, groups + sets)), shape=(len(nodes), len(nodes)))
    component = connected_components(edges, directed=False)[1]
    return [int(component[content]) for content in contents]


def manifest_clusters(manifest: Manifest) -> list[Cluster]:
    """Find the clusters of a manifest, where an image without a group has its path as group."""
    rows, links = (
        [_Row(row.path, row.label, None if row.group == row.path else row.group) for row in some]
        for some in (manifest.rows, manifest.unlabelled)
    )
    every = manifest.every()
    near = {row.path: row.near for row in every if row.near is not None}
    return find_clusters(rows, {row.path: row.id for row in every}, manifest.task, near, links)


def cluster_of(manifest: Manifest) -> dict[str, str]:
    """Return path -> key of its cluster."""
    return {path: cluster.key for cluster in manifest_clusters(manifest) for path in cluster.paths}
