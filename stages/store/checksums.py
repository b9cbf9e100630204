"""Compute the checksums of rows in receipts, and find files that do not match their receipts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from filelock import FileLock, Timeout

from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import CRC_BYTES, ShardReceipt
from stages.files import atomic_write
from stages.store.array_sources import DirectArray, Source, open_source, row_checksum
from stages.store.index import read_shard_receipt
from stages.store.layout import Store

THREADS = min(8, os.cpu_count() or 1)
"""Shards compared at the same time."""


def stored_checksums(store: Store, shard: int, rows: int) -> dict[str, str]:
    """Read the CRC32C of each row from the files of a shard, in the form of `ShardReceipt.crc32c`.

    Args:
        store: The store.
        shard: A shard whose files are known to be undamaged.
        rows: Number of its rows.

    Returns:
        Array name -> checksums as hex.

    Raises:
        CacheIncompleteError: If a file or a row is gone.
        CacheCorruptError: If one is damaged.
    """
    return {name: _checksums(source, store, name, shard, range(rows)).hex() for name, source in _sources(store).items()}


def exchanged_shards(store: Store, shards: Iterable[int]) -> list[int]:
    """Return the finished shards with a file that does not match the receipt, such as another shard's file.

    Compares the first and the last row. In uncompressed arrays only their stored checksums are read, a few bytes per
    file. Receipts of earlier versions have no checksums and are skipped.
    """
    sources = _sources(store)

    def differs(shard: int) -> bool:
        try:
            receipt = read_shard_receipt(store, shard)
            slots = sorted({0, len(receipt.rows) - 1})
            for name, source in sources.items():
                expected = receipt.checksums(name)
                if expected is None:
                    return False
                stored = _checksums(source, store, name, shard, slots)
                if stored != b"".join(expected[CRC_BYTES * slot : CRC_BYTES * (slot + 1)] for slot in slots):
                    return True
        except (CacheCorruptError, CacheIncompleteError):
            return True
        return False

    numbers = sorted(set(shards))
    with ThreadPoolExecutor(THREADS) as pool:
        return [shard for shard, wrong in zip(numbers, pool.map(differs, numbers), strict=True) if wrong]


def add_checksums(store: Store, receipt: ShardReceipt) -> bool:
    """Add row checksums to a receipt of an earlier version whose files were just compared with it.

    The digest of the receipt in extraction receipts does not change.

    Returns:
        Whether the receipt was written. It is not if the shard is gone or locked by another process, if its arrays
        cannot be read, or if the store cannot be written.
    """
    try:
        checksums = stored_checksums(store, receipt.shard, len(receipt.rows))
    except (CacheCorruptError, CacheIncompleteError):
        return False
    complete = receipt.model_copy(update={"crc32c": checksums})
    lock = FileLock(store.path / "locks" / f"{receipt.shard:06d}.lock")
    with suppress(Timeout, OSError), lock.acquire(blocking=False):
        if store.receipt(receipt.shard).exists():
            atomic_write(store.receipt(receipt.shard), complete.to_json())
            return True
    return False


def _sources(store: Store) -> dict[str, Source]:
    return {name: open_source(store.group, name, layout, store.shard_size) for name, layout in store.layouts.items()}


def _checksums(source: Source, store: Store, name: str, shard: int, slots: Iterable[int]) -> bytes:
    slots = list(slots)
    stored = source.stored_checksums(shard, slots) if isinstance(source, DirectArray) else None
    if stored is not None:
        return stored
    layout = store.layouts[name]
    rows = np.empty((len(slots), *layout.shape), layout.dtype)
    source.read([shard * store.shard_size + slot for slot in slots], rows)
    return b"".join(row_checksum(row) for row in rows)
