"""Plan an extraction: which rows are cached, and what the others cost."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.features import ExtractionPlan, FeatureSpec, LpmInfo
from schemas.manifest import Manifest
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.views import ViewRow, manifest_rows
from stages.extract.normalisation import known_statistics
from stages.files import sha256_file
from stages.lpm.catalogue import find_model
from stages.lpm.feature_maps import map_operations
from stages.lpm.loading import describe_lpm
from stages.lpm.weights import locate_weights
from stages.prepare.folds import all_to_train
from stages.store.array_layouts import array_layouts
from stages.store.index import RowIndex, mismatched_shards, refresh_index
from stages.store.layout import Store, open_store_layout, store_path
from stages.store.manage.reuse import reusable_rows
from stages.store.writer import split_into_shards

PROBE_EFFICIENCY = 0.6
"""Speed of a ViT's forward pass as a share of that of a large matrix product."""


@dataclass(frozen=True)
class Inventory:
    """Rows of a store."""

    index: RowIndex | None
    """Place of each row; None without a store."""
    broken: tuple[int, ...]
    """Shards whose receipt or files do not fit; to be computed again."""
    seconds_per_image: float | None
    """Median over the shards."""

    def shards_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the number of the complete shard that holds each row, or -1."""
        if self.index is None:
            return np.full(len(ids), -1, np.int64)
        complete = np.zeros(int(self.index.shards["number"].max(initial=0)) + 1, bool)
        complete[self.index.shards["number"]] = True
        complete[[number for number in self.broken if number < len(complete)]] = False
        rows = self.index.find(ids, complete)
        return np.where(rows < 0, -1, rows // self.index.shard_size)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Return the rows that no complete shard holds, in their order."""
        return [ids[position] for position in np.flatnonzero(self.shards_of(ids) < 0).tolist()]


class Channels(Protocol):
    """Mean and standard deviation per channel."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel (RGB), of pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Per channel (RGB), of pixels in [0, 1]."""


def requested_spec(settings: ResolvedSettings, root: Path, channels: Channels | None = None) -> FeatureSpec:
    """Return the feature spec of resolved settings; finds and digests the weights file, but loads no model.

    Args:
        settings: Resolved.
        root: Folder of `params.yaml`.
        channels: Mean and standard deviation with `features.normalisation: dataset`, else ignored. None: those of the
            LPM, as a placeholder; with dataset no store has this spec.
    """
    weights = sha256_file(locate_weights(settings.lpm, root))
    features = settings.features
    lpm = describe_lpm(settings.lpm.name, features.image_size, root, features.with_tokens)
    spec = feature_spec(settings, lpm, weights)
    return spec if channels is None or spec.normalisation == "lpm" else with_channels(spec, channels)


def with_channels(spec: FeatureSpec, channels: Channels) -> FeatureSpec:
    """Return the spec with another mean and standard deviation."""
    lpm = spec.lpm.model_copy(update={"mean": channels.mean, "std": channels.std})
    return spec.model_copy(update={"lpm": lpm})


def take_inventory(store: Store) -> Inventory:
    """Read the receipts that are new since the last time, and compare the lengths of all files."""
    index, unusable = refresh_index(store)
    broken = sorted({*unusable, *mismatched_shards(store, index)})
    shards = index.shards[~np.isin(index.shards["number"], broken)]
    speeds = np.sort(shards["seconds"] / shards["rows"])
    return Inventory(index, tuple(broken), float(speeds[len(speeds) // 2]) if len(speeds) else None)


def required_rows(settings: ResolvedSettings, manifest: Manifest, all_views: bool) -> dict[str, ViewRow]:
    """Return the rows that a study needs, by name.

    Args:
        settings: Give the views.
        manifest: From `prepare`.
        all_views: Whether other views than the image itself are needed also of images outside the training split.
    """
    rows = manifest_rows(all_to_train(manifest) if all_views else manifest, settings.features)
    return {row.row_id: row for row in rows}


def plan_extraction(
    settings: ResolvedSettings, root: Path, cache_root: Path, manifest: Manifest, all_views: bool = False
) -> ExtractionPlan:
    """Predict what `extract` would do.

    Args:
        settings: Resolved.
        root: Folder of `params.yaml`.
        cache_root: Folder of all stores.
        manifest: From `prepare`.
        all_views: As of `required_rows`.
    """
    spec, is_known = requested_spec(settings, root), True
    if spec.normalisation == "dataset":
        statistics = known_statistics(spec, manifest, cache_root)
        is_known = statistics is not None
        spec = spec if statistics is None else with_channels(spec, statistics)
    inventory, shard_size = Inventory(None, (), None), settings.features.shard_size
    if is_known:
        with suppress(FileNotFoundError):
            store = open_store_layout(cache_root, spec)
            inventory, shard_size = take_inventory(store), store.shard_size
    rows = required_rows(settings, manifest, all_views)
    absent = inventory.missing(tuple(rows))
    copied = reusable_rows(cache_root, spec, absent) if absent and is_known else set()
    missing = len(absent) - len(copied)
    measured = inventory.seconds_per_image
    seconds = measured or 0.0
    if measured is None and missing:
        seconds = probe_seconds(_operations(settings, root, spec.lpm))
    return ExtractionPlan(
        fingerprint=spec.fingerprint if is_known else None,
        store=str(store_path(cache_root, spec.fingerprint)) if is_known else None,
        images=len(manifest.ids()),
        rows=len(rows),
        cached=len(rows) - missing,
        reused=len(copied),
        to_compute=missing,
        bytes_per_image=spec.bytes_per_image,
        statistics_bytes=spec.statistics_bytes,
        cache_bytes_by_dtype=spec.bytes_by_dtype,
        bytes=len(absent) * spec.bytes_per_image,
        files=_new_shards([rows[row_id] for row_id in absent], copied, shard_size) * (len(array_layouts(spec)) + 1),
        free_bytes=_free_bytes(cache_root),
        seconds=round(missing * seconds, 1),
        estimate="probe" if measured is None else "receipts",
    )


def _new_shards(absent: Sequence[ViewRow], copied: set[str], shard_size: int) -> int:
    """Count the shards that absent rows become: copied and computed rows share none."""
    groups = ([row for row in absent if (row.row_id in copied) == is_copy] for is_copy in (True, False))
    return sum(len(split_into_shards(group, shard_size)) for group in groups)


def _free_bytes(folder: Path) -> int:
    """Return the free space of the disk on which a folder is, or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def _operations(settings: ResolvedSettings, root: Path, lpm: LpmInfo) -> float:
    """Return the floating-point operations of one image's forward pass."""
    if lpm.map_widths:
        return map_operations(find_model(settings.lpm.name, root), lpm.image_size)
    return forward_operations(lpm)


def forward_operations(lpm: LpmInfo) -> float:
    """Floating-point operations of one image's forward pass: 24 N D^2 + 4 N^2 D per block."""
    return lpm.depth * (24.0 * lpm.tokens * lpm.width**2 + 4.0 * lpm.tokens**2 * lpm.width)


def probe_seconds(operations: float) -> float:
    """Rough seconds of a forward pass of this many operations on this machine, from a matrix product of some 50 ms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.rand(1024, 1024, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return operations * best / (2 * 1024**3) / PROBE_EFFICIENCY
