"""The stores of a cache root, what each holds and who uses it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from schemas.cache import StoreListing
from schemas.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, FptError
from schemas.features import FeatureSpec, ShardReceipt
from stages.store.layout import Store, agreed_shard_size, impossible, open_store_layout, store_attributes
from stages.store.manage.usage import live_uses, noted_uses
from stages.store.reader import read_receipt

_NAME = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class StoreFolder:
    """A store folder of a cache root."""

    path: Path
    """The folder."""
    store: Store | None
    """None where its metadata cannot be read."""
    problem: FptError | None = None
    """Why it cannot be read."""


def find_stores(cache_root: Path) -> list[StoreFolder]:
    """Every store of a cache root, by name; one that cannot be read comes with the reason."""
    found = []
    for path in sorted(cache_root.glob("*")):
        if not _NAME.fullmatch(path.name) or not path.is_dir():
            continue
        try:
            found.append(StoreFolder(path, open_store_folder(path)))
        except (CacheCorruptError, CacheMismatchError) as problem:
            found.append(StoreFolder(path, None, problem))
    return found


def open_store_folder(path: Path) -> Store:
    """Open a store of which only the folder is known.

    Raises:
        CacheCorruptError: If it does not describe itself, or its name is not that of its features.
    """
    attributes = store_attributes(path)
    try:
        spec = FeatureSpec.model_validate(attributes.get("spec"))
    except ValidationError:
        spec = None
    if spec is None or spec.fingerprint[:16] != path.name or spec.fingerprint != attributes.get("fingerprint"):
        raise CacheCorruptError(
            f"The store {path} does not describe the features that its name stands for.",
            cause="It was written by another version, or its zarr.json was changed.",
            repair="Move the folder away, then run `fpt extract`.",
        )
    try:
        return open_store_layout(path.parent, spec)
    except CacheCorruptError:
        # With the size that its arrays have, verify can write a damaged description again.
        agreed = agreed_shard_size(path, spec) if impossible(spec) is None else None
        if agreed is None:
            raise
        return Store(path, spec, agreed)


def sound_receipts(store: Store) -> dict[int, ShardReceipt]:
    """The receipts of a store whose files are there in the right length, by shard."""
    receipts = {}
    for shard in store.finished_shards():
        try:
            receipts[shard] = read_receipt(store, shard)
        except (CacheCorruptError, CacheIncompleteError):
            continue
    return receipts


def list_stores(cache_root: Path) -> list[StoreListing]:
    """What each store of a cache root holds."""
    listings = []
    for found in find_stores(cache_root):
        receipts = {} if found.store is None else sound_receipts(found.store)
        uses = noted_uses(found.path)
        listings.append(
            StoreListing(
                store=str(found.path),
                fingerprint=found.path.name if found.store is None else found.store.spec.fingerprint,
                spec=None if found.store is None else found.store.spec,
                shards=len(receipts),
                rows=len({row for receipt in receipts.values() for row in receipt.rows}),
                bytes=folder_bytes(found.path),
                studies=tuple(sorted({live.use.study for live in live_uses(found.path)})),
                last_used=max((use.time for use in uses), default=None),
            )
        )
    return listings


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
