"""What an extraction has to do: which images have features already, and what the rest costs."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.features import ExtractionPlan, FeatureSpec, LpmInfo
from schemas.manifest import Manifest
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.views import manifest_rows
from stages.files import sha256_file
from stages.lpm.loading import describe_lpm
from stages.lpm.weights import locate_weights
from stages.store.index import RowIndex, mismatched_shards, refresh_index
from stages.store.layout import Store, array_layouts, open_store_layout, store_path
from stages.store.manage.reuse import reusable_rows
from stages.store.writer import split_into_shards

PROBE_EFFICIENCY = 0.6
"""Share of a large matrix product's speed that a ViT's forward pass reaches."""


@dataclass(frozen=True)
class Inventory:
    """What a store holds."""

    index: RowIndex | None
    """Where its rows lie; None: there is no store."""
    broken: tuple[int, ...]
    """Shards whose receipt or files do not fit; to be computed again."""
    seconds_per_image: float | None
    """Median over the shards."""

    def shards_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Number of the whole shard that holds each row, -1 where none does."""
        if self.index is None:
            return np.full(len(ids), -1, np.int64)
        whole = np.zeros(int(self.index.shards["number"].max(initial=0)) + 1, bool)
        whole[self.index.shards["number"]] = True
        whole[[number for number in self.broken if number < len(whole)]] = False
        rows = self.index.find(ids, whole)
        return np.where(rows < 0, -1, rows // self.index.shard_size)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """The rows that no whole shard holds, in their order."""
        return [ids[position] for position in np.flatnonzero(self.shards_of(ids) < 0).tolist()]


def requested_spec(settings: ResolvedSettings, root: Path) -> FeatureSpec:
    """The feature spec of resolved settings; finds and digests the weights file, but loads no model."""
    weights = locate_weights(settings.lpm, root)
    return feature_spec(
        settings, describe_lpm(settings.lpm.name, settings.features.image_size, root), sha256_file(weights)
    )


def take_inventory(store: Store) -> Inventory:
    """Read the receipts that are new since the last time, and compare all files with their lengths."""
    index, unusable = refresh_index(store)
    broken = sorted({*unusable, *mismatched_shards(store, index)})
    shards = index.shards[~np.isin(index.shards["number"], broken)]
    speeds = np.sort(shards["seconds"] / shards["rows"])
    return Inventory(index, tuple(broken), float(speeds[len(speeds) // 2]) if len(speeds) else None)


def plan_extraction(settings: ResolvedSettings, root: Path, cache_root: Path, manifest: Manifest) -> ExtractionPlan:
    """Say what `extract` would do.

    Args:
        settings: Resolved.
        root: Folder of `params.yaml`.
        cache_root: Folder of all stores.
        manifest: From `prepare`.
    """
    spec = requested_spec(settings, root)
    try:
        store = open_store_layout(cache_root, spec)
        inventory, shard_size = take_inventory(store), store.shard_size
    except FileNotFoundError:
        inventory, shard_size = Inventory(None, (), None), settings.features.shard_size
    rows = {row.row_id: row for row in manifest_rows(manifest, settings.features)}
    absent = inventory.missing(tuple(rows))
    copied = reusable_rows(cache_root, spec, absent) if absent else set()
    reused = len(copied)
    missing, written = len(absent) - reused, len(absent)
    shards = sum(
        len(split_into_shards([rows[row_id] for row_id in absent if (row_id in copied) == here], shard_size))
        for here in (True, False)
    )
    known = inventory.seconds_per_image
    place = cache_root
    while not place.exists():
        place = place.parent
    return ExtractionPlan(
        fingerprint=spec.fingerprint,
        store=str(store_path(cache_root, spec.fingerprint)),
        images=len(manifest.ids()),
        rows=len(rows),
        cached=len(rows) - missing,
        reused=reused,
        to_compute=missing,
        bytes_per_image=spec.bytes_per_image,
        cache_bytes_by_dtype=spec.bytes_by_dtype,
        bytes=written * spec.bytes_per_image,
        files=shards * (len(array_layouts(spec)) + 1),
        free_bytes=shutil.disk_usage(place).free,
        seconds=round(missing * (known if known is not None else probe_seconds(spec.lpm) if missing else 0.0), 1),
        estimate="probe" if known is None else "receipts",
    )


def forward_operations(lpm: LpmInfo) -> float:
    """Floating-point operations of one image's forward pass: 24 N D^2 + 4 N^2 D per block."""
    return lpm.depth * (24.0 * lpm.tokens * lpm.width**2 + 4.0 * lpm.tokens**2 * lpm.width)


def probe_seconds(lpm: LpmInfo) -> float:
    """Rough seconds per image on this machine, from a matrix product of some 50 ms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.rand(1024, 1024, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return forward_operations(lpm) * best / (2 * 1024**3) / PROBE_EFFICIENCY
