"""Users of a store: a small note per study, and locks of the processes that are working in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import ValidationError

from schemas.base import digest
from schemas.cache import StoreUse
from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ExtractionReceipt
from stages.files import atomic_write, read_regular, storage_errors
from stages.store.extraction_receipt import read_extraction_receipt
from stages.store.layout import store_lock, store_path

USES = "used-by"


@dataclass(frozen=True)
class LiveUse:
    """A study's use of a store that is still valid."""

    use: StoreUse
    """The note."""
    shards: frozenset[int] | None
    """Shards that the study needs, or None for all."""
    receipt: ExtractionReceipt | None
    """The study's current receipt, if it can be read from here."""
    unreachable: str | None = None
    """Why the study cannot be checked from here, so that its note counts; None if it can."""


def register_use(cache_root: Path, fingerprint: str, study: Path, receipt: Path, shards: list[int] | None) -> None:
    """Note in a store that a study uses it, replacing the study's older note; does nothing if the store is missing.

    Args:
        cache_root: Folder of all stores.
        fingerprint: Fingerprint of the store.
        study: Folder of the study.
        receipt: Path of its extraction receipt.
        shards: Shards in the receipt; None at the start of an extraction, when they are not known yet.

    Raises:
        StorageError: If the store cannot be written.
    """
    path = store_path(cache_root, fingerprint)
    if not (path / "features.zarr").exists():
        return
    study, receipt = study.absolute(), receipt.absolute()
    use = StoreUse(
        study=str(study),
        receipt=str(receipt),
        host=platform.node(),
        fingerprint=fingerprint,
        shards=tuple(shards or ()),
        finished=shards is not None,
        time=datetime.now(UTC).replace(microsecond=0),
    )
    name = f"{digest(str(receipt))[:16]}.json"
    atomic_write(path / USES / name, (use.model_dump_json(indent=1) + "\n").encode())
    if use.finished:
        # An interrupted extraction of other features keeps its complete store until the study finishes another one.
        for other in cache_root.glob(f"*/{USES}/{name}"):
            old = read_use(other)
            if other.parent.parent != path and old is not None and not old.finished:
                with suppress(OSError):
                    other.unlink()


def noted_uses(store: Path) -> list[StoreUse]:
    """Return every note in a store, including those of deleted studies."""
    return [use for path in sorted((store / USES).glob("*.json")) if (use := read_use(path)) is not None]


def live_uses(store: Path, other_hosts: bool = True, forgotten: Collection[str] = ()) -> list[LiveUse]:
    """Return the uses of a store that are still valid.

    A study whose receipt is gone or names other features no longer refers to the store. A study that cannot be checked
    (moved, renamed, deleted, on an unmounted disk, on another machine) counts as a user.

    Args:
        store: Folder of the store.
        other_hosts: Whether the notes of other machines count.
        forgotten: Folders of studies that do not count if they cannot be checked.
    """
    uses = (_valid_use(use) for use in noted_uses(store))
    return [
        live
        for live in uses
        if live is not None
        and (other_hosts or live.use.host == platform.node())
        and not (live.unreachable and live.use.study in forgotten)
    ]


def exchanged_uses(store: Path) -> list[LiveUse]:
    """Return the uses of a store by studies whose notes are in other stores only.

    If two studies swap their folders, each is noted in the other's store; the features in their receipts are kept too.
    """
    noted_here = {(use.study, use.receipt) for use in noted_uses(store)}
    others = {
        (use.study, use.receipt)
        for other in store.parent.glob(f"*/{USES}")
        for use in noted_uses(other.parent)
        if use.host == platform.node()
    }
    uses = (study_use(Path(study), Path(receipt)) for study, receipt in sorted(others - noted_here))
    return [live for live in uses if live is not None and live.use.fingerprint[:16] == store.name]


def study_use(study: Path, receipt: Path) -> LiveUse | None:
    """Return the use that follows from a study's extraction receipt, whether or not the store has a note of it.

    Returns:
        The use, or None if the receipt is missing or unreadable.
    """
    try:
        extraction = read_extraction_receipt(receipt)
    except (CacheCorruptError, CacheIncompleteError):
        return None
    shards = tuple(sorted(map(int, extraction.shards)))
    use = StoreUse(
        study=str(study.absolute()),
        receipt=str(receipt.absolute()),
        host=platform.node(),
        fingerprint=extraction.fingerprint,
        shards=shards,
        finished=True,
        time=datetime.now(UTC).replace(microsecond=0),
    )
    return LiveUse(use, frozenset(shards), extraction)


def _valid_use(use: StoreUse) -> LiveUse | None:
    """Check a note against the study's current receipt; return None if the study no longer refers to the store."""
    noted = frozenset(use.shards) if use.finished else None
    if use.host != platform.node():
        return LiveUse(use, noted, None, f"it is on the machine {use.host}")
    try:
        receipt = read_extraction_receipt(Path(use.receipt)) if use.finished else None
    except CacheIncompleteError:
        reason = _unreachable(use)
        return None if reason is None else LiveUse(use, noted, None, reason)
    except CacheCorruptError:
        return LiveUse(use, noted, None, _unreachable(use))
    if receipt is None:
        return None if _deleted_copy(Path(use.study)) else LiveUse(use, None, None, _unreachable(use))
    if receipt.fingerprint != use.fingerprint:
        return None
    return LiveUse(use, frozenset(map(int, receipt.shards)), receipt)


def _unreachable(use: StoreUse) -> str | None:
    """Return why a missing receipt does not show that the study gave up its features, or None if it does."""
    study, receipt = Path(use.study), Path(use.receipt)
    folder = study
    try:
        if (study / "dvc.yaml").is_file() and not receipt.parent.exists() and not receipt.parent.is_symlink():
            # DVC removes the outputs of a stage before it runs; if the stage fails, they stay missing.
            return f"{receipt.parent} was removed, by DVC or by hand"
        for name in receipt.relative_to(study).parts[:-1] if receipt.is_relative_to(study) else ():
            if folder.is_dir() and not (folder / name).exists():
                if (folder / name).is_symlink():
                    return f"the link {folder / name} is broken"
                break
            folder /= name
        with os.scandir(folder) as entries:
            if next(entries, None) is not None:
                return None
    except FileNotFoundError:
        return None if _deleted_copy(study) else "its folder does not exist"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return f"{folder} is empty"


def _deleted_copy(study: Path) -> bool:
    """Whether a study was a temporary copy for a DVC experiment that has been removed since."""
    for folder in study.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[1].is_dir() and not study.exists()
    return False


def read_use(path: Path) -> StoreUse | None:
    """Read one note; return None if it cannot be read."""
    try:
        return StoreUse.model_validate_json(read_regular(path))
    except (ValidationError, OSError):
        return None


@contextmanager
def keep_from_gc(store: Path) -> Iterator[None]:
    """Protect a store from garbage collection while this process writes to it."""
    lock = FileLock(store / "locks" / f"at-work-{uuid4().hex}.lock")
    with storage_errors(store), store_lock(store):
        for old_lock in (store / "locks").glob("at-work-*.lock"):
            if not lock_is_held(old_lock):
                old_lock.unlink(missing_ok=True)
        lock.acquire(blocking=False)
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def lock_is_held(lock: Path) -> bool:
    """Whether a running process holds a lock file; a missing file means that no process does."""
    if not lock.exists():
        return False
    probe = FileLock(lock)
    try:
        probe.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return True
    probe.release()
    return False


def shard_is_being_written(store: Path, shard: int) -> bool:
    """Whether a running process is writing this shard."""
    return lock_is_held(store / "locks" / f"{shard:06d}.lock")


def is_in_use(store: Path) -> bool:
    """Whether a running process extracts into the store or writes one of its shards."""
    return any(lock_is_held(lock) for lock in sorted((store / "locks").glob("*.lock")) if lock.name != "store.lock")
