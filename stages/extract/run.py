"""Stage one: fill the store with the features of every image of the manifest, shard by shard."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.base import digest
from schemas.errors import CacheIncompleteError, ImageError, StorageError, UnreadableImagesError
from schemas.features import ExtractionReceipt, FeatureSpec
from schemas.manifest import Manifest
from schemas.settings import DataSettings, Settings
from stages.device import set_up
from stages.extract.features import FeatureBatch, Pixels, compute_features, to_pixels
from stages.extract.lpm import load_lpm
from stages.extract.plan import requested_spec, take_inventory
from stages.extract.receipt import write_extraction_receipt
from stages.files import sha256_file
from stages.images import read_image
from stages.store.layout import Store, create_store
from stages.store.reuse import copy_rows
from stages.store.uses import at_work, register_use
from stages.store.verify import damaged_shards
from stages.store.writer import claim_shard, remove_claimed_shards, write_shard

DECODERS = 2
"""Threads that decode ahead of the forward pass."""


@dataclass(frozen=True)
class ExtractProgress:
    """How far an extraction is."""

    done: int
    """Images whose features are in the store by now, those found there included."""
    total: int
    """Image contents of the manifest."""
    cached: int
    """Found in the store at the start."""
    repaired: int
    """Shards that were removed because their files did not fit their receipts."""
    reused: int = 0
    """Of the cached, copied from a store of more layers."""


def extract(
    settings: Settings,
    root: Path,
    cache_root: Path,
    manifest: Manifest,
    output: Path,
    progress: Callable[[ExtractProgress], None] | None = None,
    check: bool = False,
) -> ExtractionReceipt:
    """Compute the features that the store lacks and write the extraction receipt.

    Args:
        settings: Resolved.
        root: Folder of `params.yaml`.
        cache_root: Folder of all stores.
        manifest: From `prepare`.
        output: Folder for `receipt.json`.
        progress: Called at the start and after every batch.
        check: Also compare every byte of the store with its receipts first, and recompute what differs.

    Raises:
        UnreadableImagesError: If images vanished or changed since `prepare`; all others are computed first.
        StorageError: If the disk is full or cannot be written; finished shards stay.
        WeightsError: If the weights are missing or belong to another model.
    """
    spec = requested_spec(settings, root)
    store = create_store(cache_root, spec, settings.features.shard_size)
    with at_work(store.path):
        # Garbage collection may have taken an unused store between the two lines above; now it cannot.
        store = create_store(cache_root, spec, settings.features.shard_size)
        register_use(cache_root, spec.fingerprint, root, output / "receipt.json", None)
        receipt = _extract(settings, root, store, manifest, progress, check)
        write_extraction_receipt(receipt, output / "receipt.json")
        shards = [int(shard) for shard in receipt.shards]
        register_use(cache_root, spec.fingerprint, root, output / "receipt.json", shards)
    return receipt


def _extract(
    settings: Settings,
    root: Path,
    store: Store,
    manifest: Manifest,
    progress: Callable[[ExtractProgress], None] | None,
    check: bool,
) -> ExtractionReceipt:
    spec = store.spec
    inventory = take_inventory(store)
    broken = [*inventory.broken, *(damaged_shards(store) if check else ())]
    if broken:
        remove_claimed_shards(store, broken)
        inventory = take_inventory(store)
    paths = {row.id: row.path for row in reversed(manifest.rows)}
    missing = inventory.missing(manifest.ids())
    total = len(manifest.ids())
    cached = here = total - len(missing)

    def tell(done: int) -> None:
        if progress is not None:
            progress(ExtractProgress(done, total, cached, len(broken), cached - here))

    if missing:
        _require_space(store, len(missing) * spec.bytes_per_image)
        if copy_rows(store.path.parent, store, missing, lambda _: None):
            inventory = take_inventory(store)
            missing = inventory.missing(manifest.ids())
            cached = total - len(missing)
    tell(cached)
    if missing:
        folder = (root / settings.data.images).resolve()
        _fill(settings, root, store, [(image_id, folder / paths[image_id]) for image_id in missing], cached, tell)
        inventory = take_inventory(store)
    if inventory.index is None or (gone := inventory.missing(manifest.ids())):
        raise CacheIncompleteError(
            "Features that were written are gone.", gone, "Another process removed them.", "Run `fpt extract` again."
        )
    digests = inventory.index.digests()
    return ExtractionReceipt(
        fingerprint=spec.fingerprint,
        spec=spec,
        images=total,
        manifest_sha256=manifest_digest(manifest),
        shards={str(shard): digests[shard] for shard in np.unique(inventory.shards_of(manifest.ids())).tolist()},
    )


def manifest_digest(manifest: Manifest) -> str:
    """Digest of the image contents of a manifest, whatever their order, labels and splits."""
    return digest(sorted(manifest.ids()))


def _fill(
    settings: Settings,
    root: Path,
    store: Store,
    images: Sequence[tuple[str, Path]],
    cached: int,
    tell: Callable[[int], None],
) -> None:
    device = set_up(settings.compute)
    lpm = load_lpm(settings.lpm, settings.features.image_size, root)
    lpm.model.to(device)
    failures: list[tuple[str, str]] = []
    batches = _batches(images, store.spec, settings.data, settings.compute.extract_batch_size, failures)
    done = cached
    next_shard = 0
    pending = _Rows()
    start = time.perf_counter()
    exhausted = False
    while not exhausted:
        batch = next(batches, None)
        exhausted = batch is None
        if batch is not None:
            ids, pixels = batch
            pending.add(ids, compute_features(lpm, store.spec, pixels, device))
            done += len(ids)
            tell(done)
        while len(pending) >= store.shard_size or (exhausted and len(pending)):
            ids, arrays = pending.take(store.shard_size)
            with claim_shard(store, next_shard) as shard:
                write_shard(store, shard, ids, arrays, time.perf_counter() - start)
            next_shard = shard + 1
            start = time.perf_counter()
    if failures:
        raise UnreadableImagesError(
            failures, "All other images are in the store. Run `fpt prepare` again, then `fpt extract`."
        )


class _Rows:
    """Computed rows that wait until a shard is full."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._batches: list[FeatureBatch] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[str], batch: FeatureBatch) -> None:
        self._ids += ids
        self._batches.append(batch)

    def take(self, count: int) -> tuple[list[str], dict[str, NDArray[Any]]]:
        """The first `count` rows (or all); the others stay."""
        names = self._batches[0].arrays
        arrays = {name: np.concatenate([batch[name] for batch in self._batches]) for name in names}
        ids, self._ids = self._ids[:count], self._ids[count:]
        self._batches = [FeatureBatch({name: arrays[name][count:] for name in names})] if self._ids else []
        return ids, {name: arrays[name][:count] for name in names}


def _batches(
    images: Sequence[tuple[str, Path]],
    spec: FeatureSpec,
    data: DataSettings,
    size: int,
    failures: list[tuple[str, str]],
) -> Iterator[tuple[list[str], list[Pixels]]]:
    """Decode ahead in threads; yield full batches in order, without the images that fail."""

    def load(image_id: str, path: Path) -> Pixels:
        image = read_image(path, max_pixels=data.max_pixels, min_side=data.min_side)
        if sha256_file(path) != image_id:
            raise ImageError(str(path), "its content changed since `fpt prepare`")
        return to_pixels(image, spec)

    with ThreadPoolExecutor(DECODERS) as pool:
        queue: deque[tuple[str, Path, Future[Pixels]]] = deque()
        waiting = iter(images)
        ids: list[str] = []
        pixels: list[Pixels] = []
        try:
            while True:
                while len(queue) < 2 * size and (image := next(waiting, None)) is not None:
                    queue.append((*image, pool.submit(load, *image)))
                if not queue:
                    break
                image_id, path, future = queue.popleft()
                try:
                    pixels.append(future.result())
                    ids.append(image_id)
                except ImageError as error:
                    failures.append((str(path), error.reason))
                except FileNotFoundError:
                    failures.append((str(path), "the file is gone"))
                if len(ids) == size:
                    yield ids, pixels
                    ids, pixels = [], []
            if ids:
                yield ids, pixels
        finally:
            for *_, future in queue:
                future.cancel()


def _require_space(store: Store, needed: int) -> None:
    free = shutil.disk_usage(store.path).free
    if free < needed:
        raise StorageError(
            f"The features need {needed / 1e9:.2f} GB, but {store.path} has {free / 1e9:.2f} GB free.",
            repair="Free the space, or set FPT_CACHE_DIR to a larger disk; `fpt extract --plan` shows the need.",
        )
