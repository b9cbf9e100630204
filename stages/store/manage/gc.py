"""Dropping what no study refers to: whole stores, or whole shards of a store."""

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
    """Whose features stay."""

    current: LiveUse | None = None
    """Need of the study at hand (`stages.store.manage.usage.study_use`), whatever the notes in the stores are."""
    other_hosts: bool = True
    """Whether notes of other machines count, whose studies cannot be seen from here."""
    forgotten: frozenset[str] = frozenset()
    """Folders of studies that cannot be reached and do not count any more."""

    def uses(self, store: Path) -> list[LiveUse]:
        """Return the uses of a store that hold."""
        uses = live_uses(store, self.other_hosts, self.forgotten) + exchanged_uses(store)
        if self.current is not None and self.current.use.fingerprint[:16] == store.name:
            uses.append(self.current)
        return uses


KEEP_ALL = Retention()
"""Every study with a note."""


def find_garbage(cache_root: Path, keep: Retention = KEEP_ALL) -> list[Garbage]:
    """What can go; nothing is deleted. A store that a living process works in is left alone."""
    found = (_garbage(store, keep) for store in find_stores(cache_root))
    return [garbage for garbage in found if garbage is not None]


def unreachable_studies(cache_root: Path, keep: Retention = KEEP_ALL) -> list[UnreachableStudy]:
    """Studies that count as users because they cannot be looked at."""
    found: dict[tuple[str, str], list[LiveUse]] = {}
    for store in find_stores(cache_root):
        for live in keep.uses(store.path):
            if live.unreachable:
                found.setdefault((live.use.study, live.use.host), []).append(live)
    return [
        UnreachableStudy(
            study=study,
            host=host,
            reason=uses[0].unreachable or "",
            stores=tuple(sorted({live.use.fingerprint[:16] for live in uses})),
            last_used=max(live.use.time for live in uses),
        )
        for (study, host), uses in sorted(found.items())
    ]


def forgettable(cache_root: Path, studies: Iterable[Path]) -> frozenset[str]:
    """Folders of studies whose notes may be dropped.

    Raises:
        ProjectError: If no store has a note of one, or it can be reached.
    """
    known = {study.study for study in unreachable_studies(cache_root)}
    # Without "..", and without following links, which may lead nowhere: notes name studies like that.
    asked = [os.path.normpath(study.expanduser().absolute()) for study in studies]
    for study in asked:
        if study not in known:
            raise ProjectError(
                f"No study at {study} counts as in use without being reachable.",
                "It can be reached, so that what it needs stays, or no store has a note of it.",
                "`fpt cache gc` lists the studies that cannot be reached.",
            )
    return frozenset(asked)


def drop_garbage(cache_root: Path, garbage: Iterable[Garbage], keep: Retention = KEEP_ALL) -> int:
    """Delete what was shown, as far as it still is garbage, and the notes of forgotten studies.

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
            freed += _drop(Path(shown.store), shown, keep)
        for found in find_stores(cache_root) if keep.forgotten else ():
            _remove_notes(found.path, keep, {use.study for use in noted_uses(found.path)} & keep.forgotten)
    return freed


def _drop(path: Path, shown: Garbage, keep: Retention) -> int:
    # Under this lock an extraction announces itself, before it looks what the store holds.
    with store_lock(path):
        found = next((found for found in find_stores(path.parent) if found.path == path), None)
        now = None if found is None else _garbage(found, keep)
        if found is None or now is None:
            return 0
        if not shown.whole:
            return _drop_shards(found, set(shown.shards) & set(now.shards), keep)
        if not now.whole:
            return 0
        # Renamed first: a store is there or not, whatever happens while its files are deleted.
        gone = path.rename(path.with_name(f"{_DROPPED}{uuid4().hex}"))
    freed = folder_bytes(gone)
    shutil.rmtree(gone)
    return freed


def _drop_shards(found: StoreFolder, shards: set[int], keep: Retention) -> int:
    store = found.store
    if store is None:
        return 0
    before = sum(_shard_bytes(store, shard) for shard in shards)
    remove_claimed_shards(store, shards)
    _remove_notes(store.path, keep)
    return before - sum(_shard_bytes(store, shard) for shard in shards)


def _garbage(found: StoreFolder, keep: Retention) -> Garbage | None:
    if is_in_use(found.path):
        return None
    uses = keep.uses(found.path)
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
    free = [s for s in store.finished_shards() if s not in needed and not shard_is_being_written(store.path, s)]
    if not free:
        return None
    size = sum(_shard_bytes(store, shard) for shard in free)
    return Garbage(store=str(store.path), whole=False, shards=tuple(free), bytes=size, last_used=last_used)


def _shard_bytes(store: Store, shard: int) -> int:
    files = [store.receipt(shard), *(store.shard_file(name, shard) for name in store.layouts)]
    return sum(file.stat().st_size for file in files if file.exists())


def _remove_notes(path: Path, keep: Retention, studies: Collection[str] | None = None) -> None:
    """Remove the notes of studies that do not refer to the store any more: of all, or of some."""
    alive = {(live.use.study, live.use.receipt) for live in keep.uses(path)}
    for file in (path / USES).glob("*.json"):
        use = read_use(file)
        if use is None or (use.study, use.receipt) not in alive:
            if studies is not None and (use is None or use.study not in studies):
                continue
            file.unlink(missing_ok=True)
