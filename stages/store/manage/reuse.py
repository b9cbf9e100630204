"""Rows from a store of more layers: what the LPM computed for those serves a run that taps fewer."""

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
    """Whether a store of `other` holds the features of `spec`: the same but for more layers, or pooled outputs."""
    enough = set(spec.layers) <= set(other.layers) and spec.pooled <= other.pooled and spec != other
    return enough and other.model_copy(update={"layers": spec.layers, "pooled": spec.pooled}) == spec


def donors(cache_root: Path, spec: FeatureSpec) -> list[Store]:
    """Stores from which rows of `spec` can be copied; the one with the fewest layers first."""
    stores = [found.store for found in find_stores(cache_root) if found.store is not None]
    return sorted((s for s in stores if serves(spec, s.spec)), key=lambda store: len(store.spec.layers))


def reusable_rows(cache_root: Path, spec: FeatureSpec, missing: Sequence[str]) -> set[str]:
    """Which of the missing rows another store has."""
    wanted, found = set(missing), set[str]()
    for donor in donors(cache_root, spec):
        for receipt in sound_receipts(donor).values():
            found |= wanted.intersection(receipt.rows)
    return found


def copy_rows(cache_root: Path, store: Store, missing: Sequence[str], tell: Callable[[int], None]) -> int:
    """Copy rows into `store` from other stores of the cache root, shard by shard.

    A row that turns out to be damaged is left to the LPM.

    Args:
        cache_root: Folder of all stores.
        store: Where rows are missing.
        missing: Names of rows.
        tell: Called with the number of rows copied so far.

    Returns:
        Rows copied.
    """
    copied: set[str] = set()
    for donor in donors(cache_root, store.spec):
        receipts = sound_receipts(donor)
        held = {row.row_id: row for receipt in receipts.values() for row in receipt.origins}
        wanted = [held[row_id] for row_id in missing if row_id in held and row_id not in copied]
        if not wanted:
            continue
        extraction = ExtractionReceipt(
            fingerprint=donor.spec.fingerprint,
            spec=donor.spec,
            images=len(held),
            manifest_sha256="",
            shards={str(shard): receipt_digest(receipt) for shard, receipt in receipts.items()},
        )
        # What a row cost the LPM, so that later estimates stay right; a copy costs nearly nothing.
        speeds = sorted(receipt.seconds / len(receipt.rows) for receipt in receipts.values())
        seconds = speeds[len(speeds) // 2]
        reader = open_store(donor.path.parent, extraction)
        start = 0
        try:
            for part in split_into_shards(wanted, store.shard_size):
                sound, rows = _read(reader, donor.spec, store.spec, [row.row_id for row in part])
                if sound:
                    origins = [held[row_id] for row_id in sound]
                    with claim_shard(store, start) as shard:
                        write_shard(store, shard, sound, rows, seconds * len(sound), origins)
                    start = shard + 1
                    copied.update(sound)
                    tell(len(copied))
        finally:
            reader.close()
    return len(copied)


def _read(
    reader: StoreReader, have: FeatureSpec, want: FeatureSpec, ids: list[str]
) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Rows in the layers of `want`, without the damaged ones."""
    layouts = array_layouts(have)
    names = [name for name in array_layouts(want) if name != "sha256"]
    try:
        rows, sound = reader.read(ids, names), ids
    except (CacheCorruptError, CacheIncompleteError):
        if len(ids) == 1:
            return [], {}
        parts = [part for image_id in ids if (part := _read(reader, have, want, [image_id]))[0]]
        sound = [image_id for part in parts for image_id in part[0]]
        return sound, {name: np.concatenate([part[1][name] for part in parts]) for name in names} if parts else {}
    taken = [have.layers.index(layer) for layer in want.layers]
    sliced = {
        name: np.ascontiguousarray(array[:, taken]) if layouts[name].dims[0] == "layer" else array
        for name, array in rows.items()
    }
    return sound, sliced
