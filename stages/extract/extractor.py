"""Stage one: fill the store with the features of every image of the manifest and its views, shard by shard."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schemas.base import digest
from schemas.errors import CacheIncompleteError, StorageError, UnreadableImagesError
from schemas.features import ExtractionReceipt
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from schemas.views import manifest_rows
from stages.extract.plan import Inventory, requested_spec, take_inventory
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
"""Does tasks, in any order, and yields each when its shard has its receipt; like `stages.extract.shard_task.inline`."""


@dataclass(frozen=True)
class ExtractProgress:
    """How far an extraction is."""

    done: int
    """Rows that are in the store by now, those found there included."""
    total: int
    """Rows that the manifest needs: its images, and the other views of those to train on."""
    cached: int
    """Found in the store at the start."""
    repaired: int
    """Shards that were removed because their files did not fit their receipts."""
    reused: int = 0
    """Of the cached, copied from a store of more layers."""


def extract(
    settings: ResolvedSettings,
    root: Path,
    cache_root: Path,
    manifest: Manifest,
    output: Path,
    progress: Callable[[ExtractProgress], None] | None = None,
    check: bool = False,
    execute: Execute = inline,
    checking: Progress | None = None,
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
        execute: Who does the tasks: this process, or a cluster.
        checking: Told with shards how far the check is.

    Raises:
        UnreadableImagesError: If images vanished or changed since `prepare`; all others are computed first.
        StorageError: If the disk is full or cannot be written; finished shards stay.
        WeightsError: If the weights are missing or belong to another model.
    """
    spec = requested_spec(settings, root)
    store = create_store(cache_root, spec, settings.features.shard_size)
    with keep_from_gc(store.path):
        # Garbage collection may have taken an unused store between the two lines above; now it cannot.
        store = create_store(cache_root, spec, settings.features.shard_size)
        register_use(cache_root, spec.fingerprint, root, output / "receipt.json", None)
        receipt = _extract(settings, root, store, manifest, progress, check, execute, checking)
        write_extraction_receipt(receipt, output / "receipt.json")
        shards = [int(shard) for shard in receipt.shards]
        register_use(cache_root, spec.fingerprint, root, output / "receipt.json", shards)
    return receipt


def _extract(
    settings: ResolvedSettings,
    root: Path,
    store: Store,
    manifest: Manifest,
    progress: Callable[[ExtractProgress], None] | None,
    check: bool,
    execute: Execute,
    checking: Progress | None,
) -> ExtractionReceipt:
    spec = store.spec
    inventory = take_inventory(store)
    rows = {row.row_id: row for row in manifest_rows(manifest, settings.features)}
    ids = tuple(rows)
    broken = _broken_shards(store, inventory, ids, check, checking)
    if broken:
        remove_claimed_shards(store, broken)
        inventory = take_inventory(store)
    missing = inventory.missing(ids)
    total = len(ids)
    cached = here = total - len(missing)

    def tell(done: int) -> None:
        if progress is not None:
            progress(ExtractProgress(done, total, cached, len(broken), cached - here))

    if missing:
        _require_space(store, len(missing) * spec.bytes_per_image)
        if copy_rows(store.path.parent, store, missing, lambda _: None):
            inventory = take_inventory(store)
            missing = inventory.missing(ids)
            cached = total - len(missing)
    done = cached

    def count(computed: int) -> None:
        nonlocal done
        done += computed
        tell(done)

    tell(done)
    if missing:
        folder = (root / settings.data.images).resolve()
        paths = {row.id: str(folder / row.path) for row in reversed(manifest.rows)}
        images = [(rows[name].image, paths[rows[name].image], rows[name].view) for name in missing]
        _fill(settings, root, store, plan_tasks(store, images), execute, count)
        inventory = take_inventory(store)
    if inventory.index is None or (gone := inventory.missing(ids)):
        raise CacheIncompleteError(
            "Features that were written are gone.", gone, "Another process removed them.", "Run `fpt extract` again."
        )
    digests = inventory.index.digests()
    return ExtractionReceipt(
        fingerprint=spec.fingerprint,
        spec=spec,
        images=len(manifest.ids()),
        manifest_sha256=manifest_digest(manifest),
        shards={str(shard): digests[shard] for shard in np.unique(inventory.shards_of(ids)).tolist()},
        views=settings.features.views,
        crops=settings.features.crops,
        crop_scale=settings.features.crop_scale,
    )


def _broken_shards(
    store: Store, inventory: Inventory, ids: Sequence[str], check: bool, checking: Progress | None
) -> list[int]:
    """Shards to compute again: without `check`, only those that hold rows of `ids` are looked into."""
    used = {shard for shard in inventory.shards_of(ids).tolist() if shard >= 0}
    wrong = damaged_shards(store, checking) if check else exchanged_shards(store, used)
    return sorted({*inventory.broken, *wrong})


def manifest_digest(manifest: Manifest) -> str:
    """Digest of the image contents of a manifest, whatever their order, labels and splits."""
    return digest(sorted(manifest.ids()))


def _fill(
    settings: ResolvedSettings,
    root: Path,
    store: Store,
    tasks: Sequence[ShardTask],
    execute: Execute,
    on_rows: Callable[[int], None],
) -> None:
    failures = [failure for done in execute(settings, root, store, tasks, on_rows) for failure in done.failures]
    if failures:
        raise UnreadableImagesError(
            list(dict.fromkeys(failures)),
            "All other images are in the store. Run `fpt prepare` again, then `fpt extract`.",
        )


def plan_tasks(store: Store, images: Sequence[tuple[str, str, str]]) -> list[ShardTask]:
    """(image id, path, view) of rows, a shard each time (`split_into_shards`), on the lowest numbers that are free."""
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
