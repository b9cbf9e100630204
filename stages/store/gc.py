"""Dropping what no study refers to: whole stores, or whole shards of a store."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from schemas.cache import Garbage
from stages.files import storage_errors
from stages.store.inventory import FoundStore, find_stores, folder_bytes
from stages.store.layout import Store, store_lock
from stages.store.uses import USES, is_at_work, live_uses, noted_uses, read_use, shard_is_held
from stages.store.writer import remove_claimed_shards

_DROPPED = ".dropped-"


def find_garbage(cache_root: Path, other_hosts: bool = True) -> list[Garbage]:
    """What can go; nothing is deleted. A store that a living process works in is left alone.

    Args:
        cache_root: Folder of all stores.
        other_hosts: Whether notes of other machines count, whose studies cannot be seen from here.
    """
    found = (_garbage(store, other_hosts) for store in find_stores(cache_root))
    return [garbage for garbage in found if garbage is not None]


def drop_garbage(cache_root: Path, garbage: Iterable[Garbage], other_hosts: bool = True) -> int:
    """Delete what was shown, as far as it still is garbage.

    Returns:
        Bytes freed.

    Raises:
        StorageError: If the cache cannot be written.
    """
    freed = 0
    with storage_errors(cache_root):
        for remains in cache_root.glob(f"{_DROPPED}*"):
            shutil.rmtree(remains, ignore_errors=True)
        for shown in garbage:
            freed += _drop(Path(shown.store), shown, other_hosts)
    return freed


def _drop(path: Path, shown: Garbage, other_hosts: bool) -> int:
    # Under this lock an extraction announces itself, before it looks what the store holds.
    with store_lock(path):
        found = next((found for found in find_stores(path.parent) if found.path == path), None)
        now = None if found is None else _garbage(found, other_hosts)
        if found is None or now is None:
            return 0
        if not shown.whole:
            return _drop_shards(found, set(shown.shards) & set(now.shards), other_hosts)
        if not now.whole:
            return 0
        # Renamed first: a store is there or not, whatever happens while its files are deleted.
        gone = path.rename(path.with_name(f"{_DROPPED}{uuid4().hex}"))
    freed = folder_bytes(gone)
    shutil.rmtree(gone)
    return freed


def _drop_shards(found: FoundStore, shards: set[int], other_hosts: bool) -> int:
    store = found.store
    if store is None:
        return 0
    before = sum(_shard_bytes(store, shard) for shard in shards)
    remove_claimed_shards(store, shards)
    _forget_dead(store.path, other_hosts)
    return before - sum(_shard_bytes(store, shard) for shard in shards)


def _garbage(found: FoundStore, other_hosts: bool) -> Garbage | None:
    if is_at_work(found.path):
        return None
    uses = live_uses(found.path, other_hosts)
    last_used = max((use.time for use in noted_uses(found.path)), default=None)
    if not uses:
        shards = () if found.store is None else tuple(found.store.finished_shards())
        return Garbage(
            store=str(found.path), whole=True, shards=shards, bytes=folder_bytes(found.path), last_used=last_used
        )
    needed: set[int] = set()
    for live in uses:
        if live.shards is None:
            return None
        needed |= live.shards
    store = found.store
    if store is None:
        return None
    free = [s for s in store.finished_shards() if s not in needed and not shard_is_held(store.path, s)]
    if not free:
        return None
    size = sum(_shard_bytes(store, shard) for shard in free)
    return Garbage(store=str(store.path), whole=False, shards=tuple(free), bytes=size, last_used=last_used)


def _shard_bytes(store: Store, shard: int) -> int:
    files = [store.receipt(shard), *(store.shard_file(name, shard) for name in store.layouts)]
    return sum(file.stat().st_size for file in files if file.exists())


def _forget_dead(path: Path, other_hosts: bool) -> None:
    """Remove the notes of studies that do not refer to the store any more."""
    alive = {(live.use.study, live.use.receipt) for live in live_uses(path, other_hosts)}
    for file in (path / USES).glob("*.json"):
        use = read_use(file)
        if use is None or (use.study, use.receipt) not in alive:
            file.unlink(missing_ok=True)
