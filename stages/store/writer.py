"""Write a store: one task writes one complete shard, then its receipt.

A shard number is claimed by a file lock, which the operating system releases when the process dies: the number of a
killed writer is used again, and two writers never share a shard. A shard is finished when its receipt exists.
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
from stages.store.layout import Store, grow_store, store_lock

LOOKAHEAD = 256
"""Probe this many shard numbers before listing the folder of receipts, which takes a second for a million shards. A
caller that starts near the last finished shard never lists it."""

RowTuple = TypeVar("RowTuple", bound=tuple[str, ...])


@contextmanager
def claim_shard(store: Store, start: int = 0) -> Iterator[int]:
    """Lock the lowest shard number, from `start` upwards, that has no receipt and no living writer.

    Yields:
        The number; the lock is held until the block ends.

    Raises:
        StorageError: If the folder of locks cannot be written.
    """
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
                    # Another writer may have finished this shard between the check above and the lock.
                    if not store.receipt(shard).exists():
                        if abandoned:
                            _remove_fragments(store, shard)
                        yield shard
                        return
                finally:
                    # A finished shard needs no lock: a process that opened the old file sees the receipt first.
                    if store.receipt(shard).exists():
                        with suppress(OSError):
                            Path(lock.lock_file).unlink(missing_ok=True)
                    lock.release()
        shard += 1


def write_shard(
    store: Store,
    shard: int,
    row_ids: Sequence[str],
    arrays: dict[str, NDArray[Any]],
    seconds: float,
    origins: Sequence[ViewRow] = (),
) -> ShardReceipt:
    """Write one claimed shard of every array, then its receipt.

    Args:
        store: The store.
        shard: Number from `claim_shard`, still locked.
        row_ids: Row ids (hex), at most `store.shard_size`.
        arrays: keys, values, indices, pooled and side, each (len(row_ids), ...) as in `array_layouts`.
        seconds: Time spent computing the features.
        origins: Image and view of each row; empty if every row is the unmodified image.

    Returns:
        The receipt that was written.

    Raises:
        ValueError: If there are too many rows, or an array has the wrong shape or type.
        StorageError: If the disk is full or read-only; the shard is removed again.
    """
    if not 0 < len(row_ids) <= store.shard_size:
        raise ValueError(f"{len(row_ids)} rows do not fit a shard of {store.shard_size}")
    digests = np.frombuffer(bytes.fromhex("".join(row_ids)), np.uint8).reshape(-1, 32)
    has_views = any(row.view != IDENTITY for row in origins)
    with storage_errors(store.path):
        store.receipt(shard).unlink(missing_ok=True)
        for name in store.layouts:
            store.shard_file(name, shard).unlink(missing_ok=True)
        try:
            files = _write_arrays(store, shard, {**arrays, "sha256": digests})
            receipt = ShardReceipt(
                shard=shard,
                fingerprint=store.spec.fingerprint,
                rows=tuple(row_ids),
                files={name: digest for name, (digest, _) in files.items()},
                seconds=round(seconds, 3),
                images=tuple(row.image for row in origins) if has_views else None,
                views=tuple(row.view for row in origins) if has_views else None,
                crc32c={name: checksums for name, (_, checksums) in files.items()},
            )
            atomic_write(store.receipt(shard), receipt.to_json())
        except BaseException:
            remove_shard(store, shard)
            raise
    return receipt


def _write_arrays(store: Store, shard: int, arrays: dict[str, NDArray[Any]]) -> dict[str, tuple[FileDigest, str]]:
    """Write one shard of every array and force its files to disk.

    Returns:
        Array name -> digest of its file, and CRC32C of each row as hex.
    """
    import zarr

    grow_store(store, shard + 1)
    group = zarr.open_group(store.group, mode="r+")
    first, count = shard * store.shard_size, len(arrays["sha256"])
    files = {}
    for name, layout in store.layouts.items():
        rows = arrays[name]
        if rows.shape != (count, *layout.shape) or rows.dtype != np.dtype(layout.dtype):
            raise ValueError(f"{name}: {rows.shape} {rows.dtype} does not fit {layout}")
        # An array opened through its group loses its runtime configuration.
        opened: Any = group[name]
        opened.with_config({"write_empty_chunks": True})[first : first + count] = rows
        checksums = b"".join(row_checksum(row) for row in rows).hex()
        files[name] = (_sync_and_digest(store.shard_file(name, shard)), checksums)
    return files


def split_into_shards(rows: Sequence[RowTuple], size: int) -> list[list[RowTuple]]:
    """Cut rows into shards, in their order; no shard mixes unmodified images with other views.

    The shards of views can thus be dropped once a study no longer uses views, and evaluation never reads them.

    Args:
        rows: Tuples whose last item is the view.
        size: Rows per shard.
    """
    images = [row for row in rows if row[-1] == IDENTITY]
    views = [row for row in rows if row[-1] != IDENTITY]
    return [group[first : first + size] for group in (images, views) for first in range(0, len(group), size)]


def remove_shard(store: Store, shard: int) -> None:
    """Delete the receipt of a shard, then every file, half-written ones included.

    Lists the folder of every array to find temporary files, so it is meant for failures and not for every shard.
    """
    store.receipt(shard).unlink(missing_ok=True)
    for name in store.layouts:
        for path in (store.group / name).glob(f"c.{shard}.*"):
            path.unlink(missing_ok=True)


def _remove_fragments(store: Store, shard: int) -> None:
    """Delete temporary files of a killed writer, which zarr-python had not renamed and no later write replaces."""
    for name in store.layouts:
        for path in (store.group / name).glob(f"c.{shard}.*.partial"):
            path.unlink(missing_ok=True)
    # The writer may have been killed while it grew an array. The lock keeps the file of a writer that grows one now.
    with store_lock(store.path):
        for name in store.layouts:
            for path in (store.group / name).glob("zarr.*.partial"):
                path.unlink(missing_ok=True)


def remove_claimed_shards(store: Store, shards: Iterable[int]) -> None:
    """Delete shards, each under its lock; a shard that another process holds is skipped."""
    for shard in sorted(set(shards)):
        lock = FileLock(store.path / "locks" / f"{shard:06d}.lock")
        with storage_errors(store.path), suppress(Timeout), lock.acquire(blocking=False):
            remove_shard(store, shard)


def _sync_and_digest(path: Path) -> FileDigest:
    """Force a file to disk and compute its digest: after a power cut no receipt may exist without its bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileDigest(bytes=path.stat().st_size, sha256=sha256_file(path))
