"""Index of the rows of a store: one small memory-mapped file, so that a million rows open in milliseconds.

`<store>/index/rows.bin` repeats the content of the receipts: a header, one record per shard, then all row ids in sorted
order and the position of each row. Receipts stay authoritative: a missing, stale or damaged index is rebuilt from them,
and a reader checks the receipt of a shard before it reads the shard for the first time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.base import digest
from schemas.errors import CacheCorruptError, CacheIncompleteError, StorageError
from schemas.features import ShardReceipt
from stages.files import atomic_write, open_regular, read_regular
from stages.store.layout import Store
from stages.store.shards import REPAIR

MAGIC = b"fptrows1"
ID_BYTES = 32
LISTING_SHARE = 8
"""List a folder instead of checking files one by one if at least one in this many of its files is needed."""

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("crc", "<u4"),
        ("shard_size", "<u4"),
        ("fingerprint", "V32"),
        ("arrays", "<u4"),
        ("shards", "<u4"),
        ("rows", "<u8"),
    ]
)


def shard_record(arrays: int) -> np.dtype[Any]:
    """Return the type of the index record of one shard; file lengths are in the order of `array_layouts`."""
    return np.dtype(
        [
            ("number", "<u4"),
            ("rows", "<u4"),
            ("seconds", "<f8"),
            ("digest", "V32"),
            ("receipt_bytes", "<u8"),
            ("receipt_mtime", "<i8"),
            ("files", "<u8", (arrays,)),
        ]
    )


@dataclass(frozen=True)
class RowIndex:
    """The rows of the finished shards of a store."""

    shard_size: int
    """Rows per shard."""
    shards: NDArray[Any]
    """One record per shard (`shard_record`), by ascending number."""
    ids: NDArray[np.bytes_]
    """(n,) S32: row ids, sorted."""
    places: NDArray[np.uint32]
    """(n,) position of each row: shard * shard_size + slot."""

    def __len__(self) -> int:
        return len(self.ids)

    def digests(self) -> dict[int, str]:
        """Return shard number -> digest of its receipt (hex), as in an extraction receipt."""
        return {int(number): bytes(value).hex() for number, value in zip(*self._numbers_and_digests(), strict=True)}

    def covers(self, expected: Mapping[str, str]) -> bool:
        """Whether the index has every shard of an extraction receipt, with that digest."""
        if not expected:
            return True
        try:
            numbers = np.fromiter(map(int, expected), np.uint32, len(expected))
            digests = np.frombuffer(bytes.fromhex("".join(expected.values())), "V32")
        except (ValueError, OverflowError):
            return False
        if len(digests) != len(numbers) or not len(self.shards):
            return False
        indexed_numbers, indexed_digests = self._numbers_and_digests()
        at = np.minimum(np.searchsorted(indexed_numbers, numbers), len(indexed_numbers) - 1)
        return bool((indexed_numbers[at] == numbers).all()) and indexed_digests[at].tobytes() == digests.tobytes()

    def find(self, row_ids: Sequence[str], allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Return the position of each row (n,), -1 for missing rows, the lowest if a row is stored several times.

        Args:
            row_ids: Row ids in hex.
            allowed: By shard number, whether its rows may be used; by default all may.
        """
        if not len(row_ids) or not len(self.ids):
            return np.full(len(row_ids), -1, np.int64)
        digests = np.frombuffer(bytes.fromhex("".join(row_ids)), "S32")
        at = np.searchsorted(self.ids, digests)
        last = len(self.ids) - 1
        rows = np.where(
            self.ids[np.minimum(at, last)] == digests, self.places[np.minimum(at, last)].astype(np.int64), -1
        )
        if allowed is not None:
            for position in np.flatnonzero((rows >= 0) & ~_is_allowed(allowed, rows // self.shard_size)):
                rows[position] = self._next_allowed(int(at[position]), allowed)
        return rows

    def _next_allowed(self, start: int, allowed: NDArray[np.bool_]) -> int:
        """Return the next copy of a row in an allowed shard: concurrent extractions may have computed a row twice."""
        for position in range(start, len(self.ids)):
            if self.ids[position] != self.ids[start]:
                break
            row = int(self.places[position])
            if _is_allowed(allowed, np.array([row // self.shard_size]))[0]:
                return row
        return -1

    def _numbers_and_digests(self) -> tuple[NDArray[np.uint32], NDArray[np.void]]:
        return np.ascontiguousarray(self.shards["number"]), np.ascontiguousarray(self.shards["digest"])


def _is_allowed(allowed: NDArray[np.bool_], shards: NDArray[np.int64]) -> NDArray[np.bool_]:
    inside = (shards >= 0) & (shards < len(allowed))
    return inside & allowed[np.where(inside, shards, 0)] if len(allowed) else inside


def index_path(store: Store) -> Path:
    """Return the path of the index file, whether or not it exists."""
    return store.path / "index" / "rows.bin"


def load_index(store: Store) -> RowIndex | None:
    """Map the index file; return None if it is missing, damaged or from another store."""
    arrays = len(store.layouts)
    record = shard_record(arrays)
    try:
        with os.fdopen(open_regular(index_path(store)), "rb") as file:
            raw = np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    if len(raw) < HEADER.itemsize:
        return None
    head = raw[: HEADER.itemsize].view(HEADER)[0]
    shards, rows = int(head["shards"]), int(head["rows"])
    starts = np.cumsum([HEADER.itemsize, shards * record.itemsize, rows * ID_BYTES, rows * 4])
    if (
        bytes(head["magic"]) != MAGIC
        or int(head["arrays"]) != arrays
        or len(raw) != int(starts[-1])
        or int(head["shard_size"]) != store.shard_size
        or bytes(head["fingerprint"]).hex() != store.spec.fingerprint
        or int(head["crc"]) != _checksum(head, raw[HEADER.itemsize :])
    ):
        return None
    table, ids, places = (raw[a:b] for a, b in itertools.pairwise(starts))
    return RowIndex(store.shard_size, table.view(record), ids.view("S32"), places.view("<u4"))


def write_index(store: Store, index: RowIndex) -> None:
    """Write the index atomically.

    Raises:
        StorageError: If the store cannot be written.
    """
    head = np.zeros(1, HEADER)
    head["magic"], head["shard_size"] = MAGIC, store.shard_size
    head["fingerprint"] = np.frombuffer(bytes.fromhex(store.spec.fingerprint), "V32")
    head["arrays"], head["shards"], head["rows"] = len(store.layouts), len(index.shards), len(index.ids)
    body = index.shards.tobytes() + index.ids.tobytes() + index.places.astype("<u4").tobytes()
    head["crc"] = _checksum(head[0], np.frombuffer(body, np.uint8))
    atomic_write(index_path(store), head.tobytes() + body)


def _checksum(head: Any, body: NDArray[np.uint8]) -> int:
    without_crc = bytearray(head.tobytes())
    without_crc[8:12] = bytes(4)
    # An array, not a memoryview: google_crc32c refuses writable buffers, but reads an array in place.
    return int(google_crc32c.extend(google_crc32c.value(bytes(without_crc)), np.asarray(body)))


def build_index(store: Store, shards: NDArray[Any], ids: NDArray[Any], places: NDArray[Any]) -> RowIndex:
    """Return an index with shards sorted by number and rows by (row id, position)."""
    shards = shards[np.argsort(shards["number"], kind="stable")]
    order = np.lexsort((places, ids))
    return RowIndex(store.shard_size, shards, ids[order], places[order])


def read_shard_receipt(store: Store, shard: int) -> ShardReceipt:
    """Read the receipt of a finished shard without checking its files.

    Raises:
        CacheIncompleteError: If it is gone.
        CacheCorruptError: If it is damaged, or belongs to another shard or store.
    """
    path = store.receipt(shard)
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise CacheIncompleteError(f"The receipt {path} is gone.", (path.name,), repair=REPAIR) from None
    except OSError as error:
        raise CacheCorruptError(
            f"The receipt {path} cannot be read: {error.strerror}.", path.name, repair=REPAIR
        ) from None
    return parse_shard_receipt(content, store, shard, path)


def parse_shard_receipt(
    content: bytes, store: Store, shard: int, path: PurePath | str, repair: str = REPAIR
) -> ShardReceipt:
    """Parse the receipt of a finished shard.

    Args:
        content: Bytes of the receipt file.
        store: The store it must belong to.
        shard: The shard it must describe.
        path: Path or URL for the message.
        repair: Advice in the error.

    Raises:
        CacheCorruptError: If it is damaged, or belongs to another shard or store.
    """
    name = f"{shard:06d}.json"
    try:
        receipt = ShardReceipt.model_validate_json(content)
    except ValidationError:
        raise CacheCorruptError(f"The receipt {path} is damaged.", name, repair=repair) from None
    if (
        receipt.fingerprint != store.spec.fingerprint
        or receipt.shard != shard
        or receipt.files.keys() != store.layouts.keys()
        or not 0 < len(receipt.rows) <= store.shard_size
    ):
        raise CacheCorruptError(f"The receipt {path} belongs to another shard or store.", name, repair=repair)
    return receipt


def receipt_digest(receipt: ShardReceipt) -> str:
    """Return the digest that extraction receipts hold for a shard; it covers rows and file digests, not times."""
    return digest(receipt.model_dump(mode="json", include={"shard", "fingerprint", "rows", "files"}))


def refresh_index(store: Store) -> tuple[RowIndex, tuple[int, ...]]:
    """Update the index to the current receipts, reading only new and changed ones.

    If the store is read-only, the updated index exists in memory only.

    Returns:
        The index, and the shards whose receipts are unusable.
    """
    stored = load_index(store)
    receipts = _list_receipts(store)
    record = shard_record(len(store.layouts))
    empty = RowIndex(store.shard_size, np.zeros(0, record), np.zeros(0, "S32"), np.zeros(0, np.uint32))
    old = empty if stored is None else stored
    columns = (old.shards[name].tolist() for name in ("number", "receipt_bytes", "receipt_mtime"))
    current = np.array(
        [receipts.get(number) == (size, time) for number, size, time in zip(*columns, strict=True)], bool
    )
    current_numbers = set(old.shards["number"][current].tolist())
    shards, ids, places, broken = [], [], [], []
    for number in sorted(receipts.keys() - current_numbers):
        try:
            receipt = read_shard_receipt(store, number)
        except (CacheCorruptError, CacheIncompleteError):
            broken.append(number)
            continue
        lengths = tuple(receipt.files[name].bytes for name in store.layouts)
        key = np.frombuffer(bytes.fromhex(receipt_digest(receipt)), "V32")[0]
        shards.append((number, len(receipt.rows), receipt.seconds, key, *receipts[number], lengths))
        ids.append("".join(receipt.rows))
        places.append(number * store.shard_size + np.arange(len(receipt.rows), dtype=np.uint32))
    if stored is not None and not shards and bool(current.all()):
        return stored, tuple(broken)
    current_rows = np.isin(old.places // store.shard_size, np.array(sorted(current_numbers), np.uint32))
    index = build_index(
        store,
        np.concatenate([old.shards[current], np.array(shards, record)]),
        np.concatenate([old.ids[current_rows], np.frombuffer(bytes.fromhex("".join(ids)), "S32")]),
        np.concatenate([old.places[current_rows], *places]).astype(np.uint32),
    )
    with suppress(StorageError):
        write_index(store, index)
    return index, tuple(broken)


def _list_receipts(store: Store) -> dict[int, tuple[int, int]]:
    """Return shard number -> (length in bytes, modification time in ns) of its receipt."""
    receipts = {}
    with suppress(FileNotFoundError), os.scandir(store.receipts) as entries:
        for entry in entries:
            stem, dot, kind = entry.name.partition(".")
            if stem.isdecimal() and dot and kind == "json":
                # A receipt may be deleted while the folder is listed.
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    receipts[int(stem)] = (status.st_size, status.st_mtime_ns)
    return receipts


def mismatched_shards(store: Store, index: RowIndex, numbers: Sequence[int] | None = None) -> list[int]:
    """Return the shards whose receipt or files are missing or have another length than in the index.

    Args:
        store: The store.
        index: Its index.
        numbers: Shards to check, all of them in the index; by default every shard.
    """
    shards = index.shards
    if numbers is not None:
        shards = shards[np.searchsorted(index.shards["number"], np.array(sorted(numbers), np.uint32))]
    wrong: set[int] = set()
    listing = len(shards) * LISTING_SHARE >= len(index.shards)
    places = [(store.receipts, "{:06d}.json", shards["receipt_bytes"])]
    for position, (name, layout) in enumerate(store.layouts.items()):
        places.append((store.group / name, "c.{}" + ".0" * len(layout.shape), shards["files"][:, position]))
    for folder, pattern, lengths in places:
        listed = dict(_lengths(folder)) if listing else None
        for number, length in zip(shards["number"].tolist(), lengths.tolist(), strict=True):
            file = pattern.format(number)
            if (listed.get(file) if listed is not None else _length(folder / file)) != length:
                wrong.add(number)
    return sorted(wrong)


def _lengths(folder: Path) -> Iterator[tuple[str, int]]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat().st_size


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
