"""Comparing every byte of a store with its receipts."""

from __future__ import annotations

from schemas.errors import CacheCorruptError, CacheIncompleteError
from stages.files import sha256_file
from stages.store.layout import Store
from stages.store.reader import read_receipt


def damaged_shards(store: Store) -> list[int]:
    """Numbers of the finished shards of which a receipt or a file differs from what was written."""
    damaged = []
    for shard in store.finished_shards():
        try:
            receipt = read_receipt(store, shard)
        except (CacheCorruptError, CacheIncompleteError):
            damaged.append(shard)
            continue
        if any(sha256_file(store.shard_file(name, shard)) != file.sha256 for name, file in receipt.files.items()):
            damaged.append(shard)
    return damaged
