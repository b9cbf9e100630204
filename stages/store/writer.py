"""Writing: one task, one whole shard, then its receipt.

A shard number is claimed by a lock that the operating system frees when its holder dies, so the number of a killed
writer is taken up again and two writers never meet. Done means: the receipt is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from schemas.features import FileDigest, ShardReceipt
from schemas.views import IDENTITY, ViewRow
from stages.files import atomic_write, sha256_file, storage_errors
from stages.store.array_sources import row_checksum
from stages.store.layout import Store, grow_store

LOOKAHEAD = 256
"""Numbers that are asked for one by one before the folder of receipts is listed: who knows where the finished shards
end never lists it, and a listing takes a second where there are a million."""

Named = TypeVar("Named", bound=tuple[str, ...])


@contextmanager
def claim_shard(store: Store, start: int = 0) -> Iterator[int]:
    """Hold the lowest shard number from `start` that has no receipt and no living writer."""
    finished: set[int] | None = None
    shard = start
    while True:
        if finished is None and shard - start >= LOOKAHEAD:
            finished = set(store.finished_shards())
        if not (store.receipt(shard).exists() if finished is None else shard in finished):
            lock = FileLock(store.path / "locks" / f"{shard:06d}.lock")
            abandoned = Path(lock.lock_file).exists()
            try:
                with storage_errors(store.path):
                    lock.acquire(blocking=False)
            except Timeout:
                pass
            else:
                try:
                    # Between the look and the lock another writer may have finished this very shard.
                    if not store.receipt(shard).exists():
                        if abandoned:
                            _remove_fragments(store, shard)
                        yield shard
                        return
                finally:
                    # A finished shard needs no lock: whoever holds the old file finds the receipt before it writes.
                    if store.receipt(shard).exists():
                        with suppress(OSError):
                            Path(lock.lock_file).unlink(missing_ok=True)
                    lock.release()
        shard += 1


def write_shard(
    store: Store,
    shard: int,
    ids: Sequence[str],
    arrays: dict[str, NDArray[Any]],
    seconds: float,
    origins: Sequence[ViewRow] = (),
) -> ShardReceipt:
    """Write one claimed shard of every array, then its receipt.

    Args:
        store: The store.
        shard: A number held by `claim_shard`.
        ids: Names of the rows, at most `store.shard_size`.
        arrays: keys, values, indices, pooled and side, each (len(ids), ...) as in `array_layouts`.
        seconds: What the features took.
        origins: Image and view of each row; empty: each row is an image itself.

    Raises:
        StorageError: If the disk is full or read-only; the shard is removed again.
    """
    import zarr

    if not 0 < len(ids) <= store.shard_size:
        raise ValueError(f"{len(ids)} rows do not fit a shard of {store.shard_size}")
    digests = np.frombuffer(b"".join(bytes.fromhex(id_) for id_ in ids), np.uint8).reshape(-1, 32)
    with storage_errors(store.path):
        store.receipt(shard).unlink(missing_ok=True)
        for name in store.layouts:
            store.shard_file(name, shard).unlink(missing_ok=True)
        try:
            grow_store(store, shard + 1)
            group = zarr.open_group(store.group, mode="r+")
            first = shard * store.shard_size
            files, checksums = {}, {}
            for name, layout in store.layouts.items():
                rows = digests if name == "sha256" else arrays[name]
                if rows.shape != (len(ids), *layout.shape) or rows.dtype != np.dtype(layout.dtype):
                    raise ValueError(f"{name}: {rows.shape} {rows.dtype} does not fit {layout}")
                # Opened through the group an array forgets its runtime configuration.
                opened: Any = group[name]
                array = opened.with_config({"write_empty_chunks": True})
                array[first : first + len(ids)] = rows
                checksums[name] = b"".join(row_checksum(row) for row in rows).hex()
                files[name] = _seal(store.shard_file(name, shard))
            views = any(row.view != IDENTITY for row in origins)
            receipt = ShardReceipt(
                shard=shard,
                fingerprint=store.spec.fingerprint,
                rows=tuple(ids),
                files=files,
                seconds=round(seconds, 3),
                images=tuple(row.image for row in origins) if views else None,
                views=tuple(row.view for row in origins) if views else None,
                crc32c=checksums,
            )
            atomic_write(store.receipt(shard), receipt.to_json())
        except BaseException:
            remove_shard(store, shard)
            raise
    return receipt


def split_into_shards(rows: Sequence[Named], size: int) -> list[list[Named]]:
    """Rows in their order, a shard each time; no shard mixes images themselves with other views.

    So a study that gives up its views needs none of their shards any more, and evaluation reads none of them.

    Args:
        rows: Tuples that end with the view.
        size: Of a shard.
    """
    plain, others = [row for row in rows if row[-1] == IDENTITY], [row for row in rows if row[-1] != IDENTITY]
    return [part[first : first + size] for part in (plain, others) for first in range(0, len(part), size)]


def remove_shard(store: Store, shard: int) -> None:
    """Delete the receipt and every file of a shard, half-written ones too. The receipt goes first.

    Lists every array's folder to find what has a name of its own: for what went wrong, not for every shard.
    """
    store.receipt(shard).unlink(missing_ok=True)
    for name in store.layouts:
        for path in (store.group / name).glob(f"c.{shard}.*"):
            path.unlink(missing_ok=True)


def _remove_fragments(store: Store, shard: int) -> None:
    """Delete what zarr-python had not yet renamed when a writer was killed; no later write would replace it."""
    for name in store.layouts:
        for path in (store.group / name).glob(f"c.{shard}.*.partial"):
            path.unlink(missing_ok=True)


def remove_claimed_shards(store: Store, shards: Iterable[int]) -> None:
    """Delete shards, each under its lock; one that another process holds at the moment is left to it."""
    for shard in sorted(set(shards)):
        lock = FileLock(store.path / "locks" / f"{shard:06d}.lock")
        with storage_errors(store.path), suppress(Timeout), lock.acquire(blocking=False):
            remove_shard(store, shard)


def _seal(path: Path) -> FileDigest:
    """Force a file to the disk and take its digest: a receipt must outlive a power cut no longer than its bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileDigest(bytes=path.stat().st_size, sha256=sha256_file(path))
