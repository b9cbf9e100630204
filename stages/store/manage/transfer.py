"""Push and pull: copy shards between cache roots, verify each on arrival, and write its receipt last.

A shard exists once its receipt does: an interrupted transfer leaves files that no reader opens, and a repeated transfer
keeps those that are correct. A shard whose number is taken by other content gets a free number, because its files do
not depend on the number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from schemas.cache import Transfer
from schemas.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, TransferError
from schemas.features import FileDigest, ShardReceipt
from stages.files import atomic_write, open_regular, read_regular, sha256_file, storage_errors
from stages.progress import Progress
from stages.store.checksums import exchanged_shards, stored_checksums
from stages.store.layout import Store, create_store, described_shard_size, grow_store
from stages.store.manage.inventory import sound_receipts
from stages.store.manage.push_lock import only_push
from stages.store.manage.usage import keep_from_gc
from stages.store.manage.verify import THREADS, stored_rows
from stages.store.remote import (
    Remote,
    RemoteStore,
    group_attributes,
    remote_length,
    store_file,
    transfer_errors,
)
from stages.store.writer import claim_shard, remove_claimed_shards

PIECE = 2**22
"""Bytes copied at a time."""


@dataclass
class _Count:
    """Running totals of a transfer."""

    copied: int = 0
    renumbered: int = 0
    present: int = 0
    bytes: int = 0
    failures: list[str] = field(default_factory=list)

    def result(self, fingerprint: str) -> Transfer:
        return Transfer(
            fingerprint=fingerprint,
            copied=self.copied,
            renumbered=self.renumbered,
            present=self.present,
            bytes=self.bytes,
            failures=tuple(self.failures),
        )


def pull(source: RemoteStore, cache_root: Path, progress: Progress | None = None) -> Transfer:
    """Copy the shards of a remote store with rows that the local one lacks.

    Shards that arrive damaged are skipped and reported; all others are copied.

    Args:
        source: From `remote_stores`.
        cache_root: Folder of the local stores.
        progress: Called with shards.

    Raises:
        TransferError: If the remote side cannot be read.
        StorageError: If the disk is full or read-only; what has arrived is kept.
        CacheMismatchError: If the local store has another shard size.
    """
    if source.problem is not None:
        raise source.problem
    theirs, refused = source.read_receipts()
    count = _Count(failures=[f"{name}: it is damaged there, or belongs to another store" for name in refused])
    if not theirs:
        return count.result(source.spec.fingerprint)
    store = create_store(cache_root, source.spec, source.shard_size)
    _require_shard_size(source.shard_size, store.shard_size, store.path)
    with keep_from_gc(store.path):
        store = create_store(cache_root, source.spec, source.shard_size)
        sound = sound_receipts(store)
        for shard in exchanged_shards(store, sound):
            del sound[shard]
        # A damaged shard would occupy a number, and its rows may be among those that arrive.
        remove_claimed_shards(store, set(store.finished_shards()) - sound.keys())
        local_rows = {row for receipt in sound.values() for row in receipt.rows}
        above = max([-1, *sound, *theirs]) + 1
        for done, shard in enumerate(sorted(theirs), 1):
            receipt = theirs[shard]
            if local_rows.issuperset(receipt.rows):
                count.present += 1
            else:
                # If its number is taken, the shard gets one above all numbers of both sides.
                taken = store.receipt(shard).exists()
                with claim_shard(store, above if taken else shard) as number:
                    if _fetch(source, store, receipt, number, count):
                        local_rows.update(receipt.rows)
            if progress is not None:
                progress(done, len(theirs))
    return count.result(source.spec.fingerprint)


def push(store: Store, remote: Remote, progress: Progress | None = None) -> Transfer:
    """Copy the shards of a local store with rows that the remote one lacks.

    In a folder of this machine, shard locks protect the target as for any writer; a URL accepts one push at a time.

    Args:
        store: The local store.
        remote: Cache root behind a URL.
        progress: Called with shards.

    Raises:
        TransferError: If the remote side cannot be written, or another push to it is under way.
        CacheMismatchError: If the remote store has another shard size.
    """
    if remote.local is not None:
        source = Remote(remote.fs, str(store.path.parent.absolute()), str(store.path.parent))
        return pull(source.store(store.spec, store.shard_size), remote.local, progress)
    target, count = remote.store(store.spec, store.shard_size), _Count()
    ours = sound_receipts(store)
    with transfer_errors(remote), only_push(target):
        group = target.place("features.zarr/zarr.json")
        if remote.fs.isfile(group):
            remote_size = described_shard_size(group_attributes(remote.fs.cat_file(group)), store.spec, remote.url)
            _require_shard_size(store.shard_size, remote_size, remote.url)
        theirs = _complete_receipts(target, target.receipts())
        remote_rows = {row for receipt in theirs.values() for row in receipt.rows}
        above = max([-1, *ours, *theirs]) + 1
        to_send = [shard for shard in sorted(ours) if not remote_rows.issuperset(ours[shard].rows)]
        count.present = len(ours) - len(to_send)
        numbers: dict[int, int] = {}
        for shard in to_send:
            numbers[shard] = shard
            if shard in theirs:
                numbers[shard], above = above, above + 1
        if to_send:
            _send_metadata(store, target, max([*numbers.values(), *theirs]) + 1)
        for done, shard in enumerate(to_send, 1):
            _send(store, target, ours[shard], numbers[shard], count)
            if progress is not None:
                progress(count.present + done, len(ours))
    return count.result(store.spec.fingerprint)


def _fetch(source: RemoteStore, store: Store, receipt: ShardReceipt, number: int, count: _Count) -> bool:
    """Fetch one shard into a claimed number, its receipt last; return False if it arrived damaged."""

    def fetch(name: str) -> tuple[str, int]:
        expected, path = receipt.files[name], store.shard_file(name, number)
        with suppress(FileNotFoundError):
            if path.stat().st_size == expected.bytes and sha256_file(path) == expected.sha256:
                return "", 0
        received = FileDigest(bytes=0, sha256="")
        remote, place = source.remote, source.place(store_file(store, name, receipt.shard))
        if remote_length(remote, place) not in (None, expected.bytes):
            return f"shard {receipt.shard}: its file of {name} has the wrong length there", 0
        with storage_errors(path):
            path.unlink(missing_ok=True)
            try:
                with path.open("xb") as target:
                    try:
                        reading = remote.fs.open(place, "rb")
                    except FileNotFoundError:
                        return f"shard {receipt.shard}: its file of {name} is missing there", 0
                    with reading:
                        received = copy(reading, target, expected.bytes)
                    target.flush()
                    os.fsync(target.fileno())
            finally:
                if received != expected:
                    path.unlink(missing_ok=True)
        if received != expected:
            return f"shard {receipt.shard}: its file of {name} was damaged there or in transit", received.bytes
        return "", received.bytes

    with ThreadPoolExecutor(THREADS) as pool, transfer_errors(source.remote):
        results = list(pool.map(fetch, receipt.files))
    count.bytes += sum(size for _, size in results)
    if problems := [problem for problem, _ in results if problem]:
        count.failures.append(problems[0])
        return False
    # Reading compressed rows requires the array to be long enough.
    grow_store(store, number + 1)
    if stored_rows(store, number, len(receipt.rows)) != receipt.rows:
        count.failures.append(f"shard {receipt.shard}: its receipt there names other images than its files")
        return False
    try:
        checksums = stored_checksums(store, number, len(receipt.rows))
    except (CacheCorruptError, CacheIncompleteError) as error:
        count.failures.append(f"shard {receipt.shard}: it was damaged before its receipt was written: {error.state}")
        return False
    arrived = receipt.model_copy(update={"shard": number, "crc32c": checksums})
    atomic_write(store.receipt(number), arrived.to_json())
    count.copied += 1
    count.renumbered += number != receipt.shard
    return True


def _send(store: Store, target: RemoteStore, receipt: ShardReceipt, number: int, count: _Count) -> None:
    """Send one shard to a remote store and read it back before its receipt is written."""
    remote = target.remote

    def send(name: str) -> tuple[str, int]:
        expected, path = receipt.files[name], store.shard_file(name, receipt.shard)
        place = target.place(store_file(store, name, number))
        if remote_length(remote, place) == expected.bytes and remote_digest(remote, place) == expected:
            return "", 0
        with os.fdopen(open_regular(path), "rb") as source, remote.fs.open(place, "wb") as destination:
            sent = copy(source, destination, expected.bytes)
        if sent != expected:
            return f"shard {receipt.shard}: its file of {name} is damaged here; see `fpt cache verify`", sent.bytes
        if remote_digest(remote, place) != expected:
            return f"shard {receipt.shard}: its file of {name} arrived damaged", sent.bytes
        return "", sent.bytes

    if stored_rows(store, receipt.shard, len(receipt.rows)) != receipt.rows:
        count.failures.append(f"shard {receipt.shard}: it is damaged here; see `fpt cache verify`")
        return
    for name in receipt.files:
        remote.fs.makedirs(target.place(f"features.zarr/{name}"), exist_ok=True)
    remote.fs.makedirs(target.place("receipts"), exist_ok=True)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(send, receipt.files))
    count.bytes += sum(size for _, size in results)
    if problems := [problem for problem, _ in results if problem]:
        count.failures.append(problems[0])
        return
    checksums = stored_checksums(store, receipt.shard, len(receipt.rows))
    sent = receipt.model_copy(update={"shard": number, "crc32c": checksums})
    remote.fs.pipe_file(target.place(f"receipts/{number:06d}.json"), sent.to_json())
    count.copied += 1
    count.renumbered += number != receipt.shard


def _complete_receipts(target: RemoteStore, receipts: dict[int, ShardReceipt]) -> dict[int, ShardReceipt]:
    """Return the receipts whose files all exist with the right length."""
    layout = Store(Path(), target.spec, target.shard_size)

    def is_complete(receipt: ShardReceipt) -> bool:
        return all(
            remote_length(target.remote, target.place(store_file(layout, name, receipt.shard))) == file.bytes
            for name, file in receipt.files.items()
        )

    with ThreadPoolExecutor(THREADS) as pool:
        complete = list(pool.map(is_complete, receipts.values()))
    return {shard: receipt for (shard, receipt), keep in zip(receipts.items(), complete, strict=True) if keep}


def _send_metadata(store: Store, target: RemoteStore, shards: int) -> None:
    """Write the metadata of the group and its arrays, long enough for the shards of both sides."""
    fs = target.remote.fs
    for name in ("", *(f"{array}/" for array in store.layouts)):
        place = target.place(f"features.zarr/{name}zarr.json")
        metadata = json.loads(read_regular(store.group / f"{name}zarr.json"))
        if fs.isfile(place):
            if not name:
                continue
            length = _described_rows(fs.cat_file(place), metadata)
            metadata["shape"][0] = max(length, shards * store.shard_size)
            if metadata["shape"][0] == length:
                continue
        elif name:
            metadata["shape"][0] = shards * store.shard_size
        fs.makedirs(place.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(place, json.dumps(metadata, indent=2).encode())


def _described_rows(content: bytes, ours: dict[str, Any]) -> int:
    """Return the rows of a remote array from its metadata, or 0, so that it is rewritten, if it differs from ours."""
    try:
        theirs = json.loads(content)
        length, rest = theirs["shape"][0], theirs["shape"][1:]
        same = {**theirs, "shape": rest} == {**ours, "shape": ours["shape"][1:]}
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0
    return length if same and type(length) is int and 0 <= length < 2**32 else 0


def _require_shard_size(expected: int, size: int, where: object) -> None:
    if expected != size:
        raise CacheMismatchError(
            f"The store at {where} has another shard size.",
            {"shard_size": (expected, size)},
            "Two extractions started with different features.shard_size.",
            "Move one of the stores away, or choose another cache root with FPT_CACHE_DIR.",
        )


def copy(source: IO[bytes], target: IO[bytes], length: int) -> FileDigest:
    """Copy a stream, return its length and digest; stops soon after `length` bytes, the expected end."""
    digest, count = hashlib.sha256(), 0
    while count <= length and (piece := source.read(PIECE)):
        digest.update(piece)
        count += len(piece)
        target.write(piece)
    return FileDigest(bytes=count, sha256=digest.hexdigest())


def remote_digest(remote: Remote, path: str) -> FileDigest | None:
    """Read a remote file and return its length and digest, or None if it does not exist."""
    digest, count = hashlib.sha256(), 0
    try:
        with remote.fs.open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                count += len(piece)
    except FileNotFoundError:
        return None
    return FileDigest(bytes=count, sha256=digest.hexdigest())


def require_arrival(transfers: Iterable[Transfer], url: str) -> None:
    """Check that every shard could be copied.

    Raises:
        TransferError: With a list of the shards that could not; all others were copied.
    """
    failures = [f"  {transfer.fingerprint[:16]}: {failure}" for transfer in transfers for failure in transfer.failures]
    if failures:
        raise TransferError(
            f"{len(failures)} shard{'s' if len(failures) != 1 else ''} could not be copied ({url}).",
            "\n".join(failures),
            "All others were. Run `fpt cache verify --repair` and `fpt extract` on the damaged side, then repeat this.",
        )
