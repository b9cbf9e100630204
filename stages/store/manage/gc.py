"""Garbage collection: delete the stores, and the shards of stores, that no study refers to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from schemas.cache import Garbage, UnreachableStudy
from schemas.errors import ProjectError
from stages.files import storage_errors
from stages.store.layout import Store, store_lock
from stages.store.manage.inventory import StoreFolder, find_stores, folder_bytes
from stages.store.manage.usage import (
    USES,
    LiveUse,
    exchanged_uses,
    is_in_use,
    live_uses,
    noted_uses,
    read_use,
    shard_is_being_written,
)
from stages.store.writer import remove_claimed_shards

_DROPPED = ".dropped-"


@dataclass(frozen=True)
class Retention:
    """Rules for which features are kept."""

    current: LiveUse | None = None
    """Use by the current study (`stages.store.manage.usage.study_use`), whether or not a store has a note of it."""
    other_hosts: bool = True
    """Whether notes of other machines count, whose studies cannot be checked from here."""
    forgotten: frozenset[str] = frozenset()
    """Folders of unreachable studies that no longer count."""

    def uses(self, store: Path) -> list[LiveUse]:
        """Return the uses that keep features of a store."""
        uses = live_uses(store, self.other_hosts, self.forgotten) + exchanged_uses(store)
        if self.current is not None and self.current.use.fingerprint[:16] == store.name:
            uses.append(self.current)
        return uses


KEEP_ALL = Retention()
"""Keep the features of every study with a note."""


def find_garbage(cache_root: Path, keep: Retention = KEEP_ALL) -> list[Garbage]:
    """Return what can be deleted, without deleting it. Stores that a running process works in are skipped."""
    garbage = (_garbage(folder, keep) for folder in find_stores(cache_root))
    return [item for item in garbage if item is not None]


def unreachable_studies(cache_root: Path, keep: Retention = KEEP_ALL) -> list[UnreachableStudy]:
    """Return the studies that count as users because they cannot be checked."""
    uses_of: dict[tuple[str, str], list[LiveUse]] = {}
    for folder in find_stores(cache_root):
        for live in keep.uses(folder.path):
            if live.unreachable:
                uses_of.setdefault((live.use.study, live.use.host), []).append(live)
    return [
        UnreachableStudy(
            study=study,
            host=host,
            reason=uses[0].unreachable or "",
            stores=tuple(sorted({live.use.fingerprint[:16] for live in uses})),
            last_used=max(live.use.time for live in uses),
        )
        for (study, host), uses in sorted(uses_of.items())
    ]


def forgettable(cache_root: Path, studies: Iterable[Path]) -> frozenset[str]:
    """Check that the notes of these studies may be deleted, and return the studies' folders.

    Raises:
        ProjectError: If a study can be reached, or no store has a note of it.
    """
    unreachable = {study.study for study in unreachable_studies(cache_root)}
    # Without "..", and without following links, which may be broken: notes store the paths of studies this way.
    folders = [os.path.normpath(study.expanduser().absolute()) for study in studies]
    for folder in folders:
        if folder not in unreachable:
            raise ProjectError(
                f"{folder} is not an unreachable study.",
                "It can be reached, so its features are kept, or no store has a note of it.",
                "`fpt cache gc` lists the studies that cannot be reached.",
            )
    return frozenset(folders)


def drop_garbage(cache_root: Path, garbage: Iterable[Garbage], keep: Retention = KEEP_ALL) -> int:
    """Delete listed garbage if no study refers to it by now, and the notes of forgotten studies.

    Returns:
        Freed bytes.

    Raises:
        StorageError: If the cache cannot be written.
    """
    freed = 0
    with storage_errors(cache_root):
        for remains in cache_root.glob(f"{_DROPPED}*"):
            shutil.rmtree(remains, ignore_errors=True)
        for listed in garbage:
            freed += _drop(Path(listed.store), listed, keep)
        for folder in find_stores(cache_root) if keep.forgotten else ():
            _remove_notes(folder.path, keep, {use.study for use in noted_uses(folder.path)} & keep.forgotten)
    return freed


def _drop(path: Path, listed: Garbage, keep: Retention) -> int:
    # An extraction takes the same lock to register itself, before it checks which rows the store has.
    with store_lock(path):
        folder = next((folder for folder in find_stores(path.parent) if folder.path == path), None)
        now = None if folder is None else _garbage(folder, keep)
        if folder is None or now is None:
            return 0
        if not listed.whole:
            return _drop_shards(folder, set(listed.shards) & set(now.shards), keep)
        if not now.whole:
            return 0
        # Renamed first, so that an interrupted deletion leaves no incomplete store behind.
        renamed = path.rename(path.with_name(f"{_DROPPED}{uuid4().hex}"))
    freed = folder_bytes(renamed)
    shutil.rmtree(renamed)
    return freed


def _drop_shards(folder: StoreFolder, shards: set[int], keep: Retention) -> int:
    store = folder.store
    if store is None:
        return 0
    before = sum(_shard_bytes(store, shard) for shard in shards)
    remove_claimed_shards(store, shards)
    _remove_notes(store.path, keep)
    return before - sum(_shard_bytes(store, shard) for shard in shards)


def _garbage(folder: StoreFolder, keep: Retention) -> Garbage | None:
    if is_in_use(folder.path):
        return None
    uses = keep.uses(folder.path)
    last_used = max((use.time for use in noted_uses(folder.path)), default=None)
    if not uses:
        shards = () if folder.store is None else tuple(folder.store.finished_shards())
        return Garbage(
            store=str(folder.path), whole=True, shards=shards, bytes=folder_bytes(folder.path), last_used=last_used
        )
    needed: set[int] = set()
    for live in uses:
        if live.shards is None:
            return None
        needed |= live.shards
    store = folder.store
    if store is None:
        return None
    free = [s for s in store.finished_shards() if s not in needed and not shard_is_being_written(store.path, s)]
    if not free:
        return None
    size = sum(_shard_bytes(store, shard) for shard in free)
    return Garbage(store=str(store.path), whole=False, shards=tuple(free), bytes=size, last_used=last_used)


def _shard_bytes(store: Store, shard: int) -> int:
    files = [store.receipt(shard), *(store.shard_file(name, shard) for name in store.layouts)]
    return sum(file.stat().st_size for file in files if file.exists())


def _remove_notes(path: Path, keep: Retention, studies: Collection[str] | None = None) -> None:
    """Remove the notes of studies that no longer refer to the store; with `studies`, only the notes of these."""
    alive = {(live.use.study, live.use.receipt) for live in keep.uses(path)}
    for file in (path / USES).glob("*.json"):
        use = read_use(file)
        if use is None or (use.study, use.receipt) not in alive:
            if studies is not None and (use is None or use.study not in studies):
                continue
            file.unlink(missing_ok=True)
