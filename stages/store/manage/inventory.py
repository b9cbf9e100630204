"""List the stores of a cache root with their content and their users."""

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
    """The store, or None if its metadata cannot be read."""
    problem: FptError | None = None
    """Why its metadata cannot be read."""


def find_stores(cache_root: Path) -> list[StoreFolder]:
    """Return every store folder of a cache root, sorted by name; unreadable ones come with the reason."""
    folders = []
    for path in sorted(cache_root.glob("*")):
        if not _NAME.fullmatch(path.name) or not path.is_dir():
            continue
        try:
            folders.append(StoreFolder(path, open_store_folder(path)))
        except (CacheCorruptError, CacheMismatchError) as problem:
            folders.append(StoreFolder(path, None, problem))
    return folders


def open_store_folder(path: Path) -> Store:
    """Open a store from its folder, without a spec.

    Raises:
        CacheCorruptError: If its description is unreadable or does not match the name of the folder.
    """
    attributes = store_attributes(path)
    try:
        spec = FeatureSpec.model_validate(attributes.get("spec"))
    except ValidationError:
        spec = None
    if spec is None or spec.fingerprint[:16] != path.name or spec.fingerprint != attributes.get("fingerprint"):
        raise CacheCorruptError(
            f"The description of the store {path} does not match its name.",
            cause="It was written by another version, or its zarr.json was changed.",
            repair="Move the folder away, then run `fpt extract`.",
        )
    try:
        return open_store_layout(path.parent, spec)
    except CacheCorruptError:
        # With the shard size of its arrays, `verify` can rewrite a damaged description.
        agreed = agreed_shard_size(path, spec) if impossible(spec) is None else None
        if agreed is None:
            raise
        return Store(path, spec, agreed)


def sound_receipts(store: Store) -> dict[int, ShardReceipt]:
    """Return the receipts, by shard, whose files all exist with the right length."""
    receipts = {}
    for shard in store.finished_shards():
        try:
            receipts[shard] = read_receipt(store, shard)
        except (CacheCorruptError, CacheIncompleteError):
            continue
    return receipts


def list_stores(cache_root: Path) -> list[StoreListing]:
    """Describe the content and the users of each store of a cache root."""
    listings = []
    for folder in find_stores(cache_root):
        receipts = {} if folder.store is None else sound_receipts(folder.store)
        uses = noted_uses(folder.path)
        listings.append(
            StoreListing(
                store=str(folder.path),
                fingerprint=folder.path.name if folder.store is None else folder.store.spec.fingerprint,
                spec=None if folder.store is None else folder.store.spec,
                shards=len(receipts),
                rows=len({row for receipt in receipts.values() for row in receipt.rows}),
                bytes=folder_bytes(folder.path),
                studies=tuple(sorted({live.use.study for live in live_uses(folder.path)})),
                last_used=max((use.time for use in uses), default=None),
            )
        )
    return listings


def folder_bytes(path: Path) -> int:
    """Return the total size in bytes of all files below a folder; files deleted meanwhile are skipped."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
