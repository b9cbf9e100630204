"""Stage one: fill the store with the features of every image of the manifest and its views, shard by shard."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from schemas.base import digest
from schemas.errors import CacheIncompleteError, StorageError, UnreadableImagesError
from schemas.features import ChannelStatistics, ExtractionReceipt, FeatureSpec
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from stages.extract.normalisation import training_statistics, write_statistics
from stages.extract.plan import requested_spec, required_rows, take_inventory, with_channels
from stages.extract.shard_task import ShardDone, ShardTask, inline
from stages.progress import Progress
from stages.store.checksums import exchanged_shards
from stages.store.extraction_receipt import write_extraction_receipt
from stages.store.layout import Store, create_store
from stages.store.manage.reuse import copy_rows
from stages.store.manage.usage import keep_from_gc, register_use
from stages.store.manage.verify import damaged_shards
from stages.store.writer import remove_claimed_shards, split_into_shards

Execute = Callable[
    [ResolvedSettings, Path, Store, Sequence[ShardTask], Callable[[int], None]],
    Iterable[ShardDone],
]
"""Runs tasks, in any order, and yields each when its shard has its receipt; like `stages.extract.shard_task.inline`."""

Step = Literal["statistics", "check"]
"""Steps before the first feature: mean and deviation of the training images, and the check of the store."""


@dataclass(frozen=True)
class ExtractionJob:
    """Images, settings and folders of one extraction."""

    settings: ResolvedSettings
    """Resolved."""
    root: Path
    """Folder of `params.yaml`."""
    cache_root: Path
    """Folder of all stores."""
    manifest: Manifest
    """From `prepare`."""
    output: Path
    """Folder of `receipt.json`."""
    all_views: bool = False
    """Whether other views than the image itself are needed also of images outside the training split."""
    check: bool = False
    """Whether every byte of the store is compared with its receipts first; damaged shards are computed again."""

    @property
    def images(self) -> Path:
        """Folder of the images."""
        return (self.root / self.settings.data.images).resolve()

    @property
    def receipt(self) -> Path:
        """File of the extraction receipt."""
        return self.output / "receipt.json"


@dataclass(frozen=True)
class ExtractProgress:
    """State of a running extraction."""

    done: int
    """Rows in the store by now, those cached at the start included."""
    total: int
    """Rows that the manifest needs: its images, and the other views of those to train on."""
    cached: int
    """Rows in the store at the start."""
    repaired: int
    """Shards that were removed because their files did not fit their receipts."""
    reused: int = 0
    """Rows of `cached` that were copied from a store of more layers."""


def extract(
    job: ExtractionJob,
    progress: Callable[[ExtractProgress], None] | None = None,
    preparing: Callable[[Step, int, int], None] | None = None,
    execute: Execute = inline,
) -> ExtractionReceipt:
    """Compute the features that the store lacks and write the extraction receipt.

    Args:
        job: Images, settings and folders.
        progress: Called at the start and after every batch.
        preparing: Called with (step, done, total) before that: images of the statistics, shards of the check.
        execute: Runs the tasks: in this process, or on a cluster.

    Raises:
        UnreadableImagesError: If images vanished or changed since `prepare`; all others are computed first, except
            with `features.normalisation: dataset`, which needs all training images.
        StorageError: If the disk is full or cannot be written; finished shards stay.
        WeightsError: If the weights are missing or belong to another model.
    """
    spec, statistics = _spec(job, preparing)
    store = create_store(job.cache_root, spec, job.settings.features.shard_size)
    with keep_from_gc(store.path):
        # Garbage collection may have taken an unused store between the two lines above; now it cannot.
        store = create_store(job.cache_root, spec, job.settings.features.shard_size)
        register_use(job.cache_root, spec.fingerprint, job.root, job.receipt, None)
        receipt = _Extraction(job, store, progress or (lambda _: None)).run(preparing, execute)
        if statistics is not None:
            write_statistics(statistics, job.output / "normalisation.json")
        write_extraction_receipt(receipt, job.receipt)
        shards = [int(shard) for shard in receipt.shards]
        register_use(job.cache_root, spec.fingerprint, job.root, job.receipt, shards)
    return receipt


def _spec(
    job: ExtractionJob, preparing: Callable[[Step, int, int], None] | None
) -> tuple[FeatureSpec, ChannelStatistics | None]:
    """Return the spec of the features, with the statistics of the training images if it depends on them."""
    spec = requested_spec(job.settings, job.root)
    if spec.normalisation == "lpm":
        return spec, None
    progress = None if preparing is None else partial(preparing, "statistics")
    data, cache_root = job.settings.data, job.cache_root
    statistics = training_statistics(spec, job.manifest, data, job.root, cache_root, progress)
    return with_channels(spec, statistics), statistics


class _Extraction:
    """One run over one store: repair, copy, compute, and the receipt of it."""

    def __init__(self, job: ExtractionJob, store: Store, progress: Callable[[ExtractProgress], None]) -> None:
        self._job, self._store, self._progress = job, store, progress
        self._rows = required_rows(job.settings, job.manifest, job.all_views)
        self._ids = tuple(self._rows)
        self._inventory = take_inventory(store)
        self._done = self._cached = self._reused = self._repaired = 0

    def run(self, preparing: Callable[[Step, int, int], None] | None, execute: Execute) -> ExtractionReceipt:
        self._repair(None if preparing is None else partial(preparing, "check"))
        missing = self._copy(self._inventory.missing(self._ids))
        self._done = self._cached = len(self._ids) - len(missing)
        self._count(0)
        if missing:
            self._compute(missing, execute)
        return self._receipt()

    def _repair(self, progress: Progress | None) -> None:
        """Remove damaged shards; without `job.check`, only shards with rows of this job are examined."""
        used = {shard for shard in self._inventory.shards_of(self._ids).tolist() if shard >= 0}
        damaged = damaged_shards(self._store, progress) if self._job.check else exchanged_shards(self._store, used)
        broken = sorted({*self._inventory.broken, *damaged})
        if broken:
            remove_claimed_shards(self._store, broken)
            self._inventory = take_inventory(self._store)
        self._repaired = len(broken)

    def _copy(self, missing: list[str]) -> list[str]:
        """Copy rows from stores of more layers; return the rows that are missing still."""
        if not missing:
            return missing
        _require_space(self._store, len(missing) * self._store.spec.bytes_per_image)
        if not copy_rows(self._job.cache_root, self._store, missing, lambda _: None):
            return missing
        self._inventory = take_inventory(self._store)
        left = self._inventory.missing(self._ids)
        self._reused = len(missing) - len(left)
        return left

    def _compute(self, missing: Sequence[str], execute: Execute) -> None:
        job, rows = self._job, self._rows
        # If several files have one content, the first of the manifest.
        paths = {row.id: str(job.images / row.path) for row in reversed(job.manifest.every())}
        images = [(rows[name].image, paths[rows[name].image], rows[name].view) for name in missing]
        tasks = plan_tasks(self._store, images)
        results = execute(job.settings, job.root, self._store, tasks, self._count)
        failures = [failure for result in results for failure in result.failures]
        if failures:
            raise UnreadableImagesError(
                list(dict.fromkeys(failures)),
                "All other images are in the store. Run `fpt prepare` again, then `fpt extract`.",
            )
        self._inventory = take_inventory(self._store)

    def _count(self, computed: int) -> None:
        self._done += computed
        self._progress(ExtractProgress(self._done, len(self._ids), self._cached, self._repaired, self._reused))

    def _receipt(self) -> ExtractionReceipt:
        index, features = self._inventory.index, self._job.settings.features
        missing = self._inventory.missing(self._ids)
        if index is None or missing:
            raise CacheIncompleteError(
                "Features that were written are gone.",
                missing,
                "Another process removed them.",
                "Run `fpt extract` again.",
            )
        digests = index.digests()
        return ExtractionReceipt(
            fingerprint=self._store.spec.fingerprint,
            spec=self._store.spec,
            images=len(self._job.manifest.ids()),
            manifest_sha256=manifest_digest(self._job.manifest),
            shards={str(shard): digests[shard] for shard in np.unique(self._inventory.shards_of(self._ids)).tolist()},
            views=features.views,
            crops=features.crops,
            crop_scale=features.crop_scale,
        )


def manifest_digest(manifest: Manifest) -> str:
    """Return the digest of the image contents of a manifest, whatever their order, labels and splits."""
    return digest(sorted(manifest.ids()))


def plan_tasks(store: Store, images: Sequence[tuple[str, str, str]]) -> list[ShardTask]:
    """Deal rows, given as (image id, path, view), to shards (`split_into_shards`) with the lowest free numbers."""
    finished = set(store.finished_shards())
    numbers = (number for number in itertools.count() if number not in finished)
    return [ShardTask(next(numbers), tuple(shard)) for shard in split_into_shards(images, store.shard_size)]


def _require_space(store: Store, needed: int) -> None:
    free = shutil.disk_usage(store.path).free
    if free < needed:
        raise StorageError(
            f"The features need {needed / 2**30:.2f} GiB, but {store.path} has {free / 2**30:.2f} GiB free.",
            repair="Free the space, or set FPT_CACHE_DIR to a larger disk; `fpt extract --plan` shows the need.",
        )
