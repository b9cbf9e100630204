"""Copy rows from a store that holds more per row, so that a run that needs less of it does not run the LPM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ExtractionReceipt, FeatureSpec
from stages.store.index import receipt_digest
from stages.store.layout import Store, array_layouts
from stages.store.manage.inventory import find_stores, sound_receipts
from stages.store.reader import StoreReader, open_store
from stages.store.writer import claim_shard, split_into_shards, write_shard


def serves(spec: FeatureSpec, other: FeatureSpec) -> bool:
    """Return whether a store of `other` holds the features of `spec`.

    It may have more layers, and pooled outputs, token statistics or hidden tokens that `spec` does without.
    """
    enough = spec.pooled <= other.pooled and spec.statistics <= other.statistics and spec != other
    if not enough or not set(spec.layers) <= set(other.layers) or spec.hidden not in (None, other.hidden):
        return False
    fewer = {name: getattr(spec, name) for name in ("layers", "pooled", "hidden", "statistics")}
    if not spec.layers:
        fewer["kept"] = spec.kept
    return other.model_copy(update=fewer) == spec


def donors(cache_root: Path, spec: FeatureSpec) -> list[Store]:
    """Return the stores from which rows of `spec` can be copied, fewest layers first."""
    stores = [folder.store for folder in find_stores(cache_root) if folder.store is not None]
    return sorted((s for s in stores if serves(spec, s.spec)), key=lambda store: len(store.spec.layers))


def reusable_rows(cache_root: Path, spec: FeatureSpec, missing: Sequence[str]) -> set[str]:
    """Return those of the missing row ids that another store has."""
    missing_ids, reusable = set(missing), set[str]()
    for donor in donors(cache_root, spec):
        for receipt in sound_receipts(donor).values():
            reusable |= missing_ids.intersection(receipt.rows)
    return reusable


def copy_rows(cache_root: Path, store: Store, missing: Sequence[str], on_copied: Callable[[int], None]) -> int:
    """Copy rows into `store` from other stores of the cache root, shard by shard.

    Damaged rows are skipped, so the LPM computes them.

    Args:
        cache_root: Folder of all stores.
        store: Store that lacks the rows.
        missing: Row ids.
        on_copied: Called with the number of rows copied so far.

    Returns:
        Number of rows copied.
    """
    copied: set[str] = set()
    for donor in donors(cache_root, store.spec):
        receipts = sound_receipts(donor)
        origin_of = {row.row_id: row for receipt in receipts.values() for row in receipt.origins}
        to_copy = [origin_of[row_id] for row_id in missing if row_id in origin_of and row_id not in copied]
        if not to_copy:
            continue
        extraction = ExtractionReceipt(
            fingerprint=donor.spec.fingerprint,
            spec=donor.spec,
            images=len(origin_of),
            manifest_sha256="",
            shards={str(shard): receipt_digest(receipt) for shard, receipt in receipts.items()},
        )
        # Time that the LPM took per row, not the time of the copy: estimates for later runs are based on it.
        speeds = sorted(receipt.seconds / len(receipt.rows) for receipt in receipts.values())
        seconds = speeds[len(speeds) // 2]
        reader = open_store(donor.path.parent, extraction)
        start = 0
        try:
            for batch in split_into_shards(to_copy, store.shard_size):
                sound, rows = _read(reader, donor.spec, store.spec, [row.row_id for row in batch])
                if sound:
                    origins = [origin_of[row_id] for row_id in sound]
                    with claim_shard(store, start) as shard:
                        write_shard(store, shard, sound, rows, seconds * len(sound), origins)
                    start = shard + 1
                    copied.update(sound)
                    on_copied(len(copied))
        finally:
            reader.close()
    return len(copied)


def _read(
    reader: StoreReader, donor: FeatureSpec, target: FeatureSpec, row_ids: list[str]
) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Read rows of a donor store, reduced to the layers and statistics of `target`.

    Returns:
        Ids of the undamaged rows, and their arrays by name.
    """
    layouts = array_layouts(donor)
    names = [name for name in array_layouts(target) if name != "sha256"]
    try:
        rows, sound = reader.read(row_ids, names), row_ids
    except (CacheCorruptError, CacheIncompleteError):
        if len(row_ids) == 1:
            return [], {}
        single = [read for row_id in row_ids if (read := _read(reader, donor, target, [row_id]))[0]]
        sound = [row_id for ids, _ in single for row_id in ids]
        return sound, {name: np.concatenate([rows[name] for _, rows in single]) for name in names} if single else {}
    layer_positions = [donor.layers.index(layer) for layer in target.layers]
    sliced = {
        name: np.ascontiguousarray(array[:, layer_positions]) if layouts[name].dims[0] == "layer" else array
        for name, array in rows.items()
    }
    if target.segments:
        sliced["statistics"] = np.ascontiguousarray(sliced["statistics"][:, _columns(donor, target)])
    return sound, sliced


def _columns(donor: FeatureSpec, target: FeatureSpec) -> NDArray[np.intp]:
    """Return the positions of the target's statistics among those of the donor, which has more layers."""
    of_donor = {segment.name: segment for segment in donor.segments}
    segments = [of_donor[segment.name] for segment in target.segments]
    return np.concatenate([np.arange(segment.start, segment.stop) for segment in segments])
