"""Where every row of a store lies: one small file that is mapped, so that a million rows open in milliseconds.

`<store>/index/rows.bin` repeats what the receipts say: a header, one record a shard, then the digests of all images,
sorted, and the row of each. Receipts stay the truth: a missing, stale or damaged index is made again from them, and a
reader compares a shard's receipt with what it expects before it reads the shard for the first time.
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
"""One listing of a folder beats a call a file where at least one in this many of its files is asked for."""

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
    """What the index keeps of one shard; lengths of files in the order of `array_layouts`."""
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
    """One record a shard (`shard_record`), by ascending number."""
    ids: NDArray[np.bytes_]
    """(n,) S32, sorted: digests of the images."""
    places: NDArray[np.uint32]
    """(n,) row of each: shard * shard_size + slot."""

    def __len__(self) -> int:
        return len(self.ids)

    def digests(self) -> dict[int, str]:
        """Shard number -> digest of its receipt (hex), as an extraction receipt keeps it."""
        return {int(number): bytes(value).hex() for number, value in zip(*self._numbers_and_digests(), strict=True)}

    def covers(self, expected: Mapping[str, str]) -> bool:
        """Whether every shard of an extraction receipt is here, with that digest."""
        if not expected:
            return True
        try:
            numbers = np.fromiter(map(int, expected), np.uint32, len(expected))
            wanted = np.frombuffer(bytes.fromhex("".join(expected.values())), "V32")
        except (ValueError, OverflowError):
            return False
        if len(wanted) != len(numbers) or not len(self.shards):
            return False
        here, found = self._numbers_and_digests()
        at = np.minimum(np.searchsorted(here, numbers), len(here) - 1)
        return bool((here[at] == numbers).all()) and found[at].tobytes() == wanted.tobytes()

    def find(self, ids: Sequence[str], allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Row of each image id, -1 where there is none; of several rows of one image the lowest.

        Args:
            ids: Sha256 in hex.
            allowed: By shard number, whether its rows count; None: all do.
        """
        if not len(ids) or not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        wanted = np.frombuffer(bytes.fromhex("".join(ids)), "S32")
        at = np.searchsorted(self.ids, wanted)
        last = len(self.ids) - 1
        rows = np.where(
            self.ids[np.minimum(at, last)] == wanted, self.places[np.minimum(at, last)].astype(np.int64), -1
        )
        if allowed is not None:
            for position in np.flatnonzero((rows >= 0) & ~_of(allowed, rows // self.shard_size)):
                rows[position] = self._next_allowed(int(at[position]), allowed)
        return rows

    def _next_allowed(self, start: int, allowed: NDArray[np.bool_]) -> int:
        """The same image may lie in several shards: two extractions computed it at the same time."""
        for position in range(start, len(self.ids)):
            if self.ids[position] != self.ids[start]:
                break
            row = int(self.places[position])
            if _of(allowed, np.array([row // self.shard_size]))[0]:
                return row
        return -1

    def _numbers_and_digests(self) -> tuple[NDArray[np.uint32], NDArray[np.void]]:
        return np.ascontiguousarray(self.shards["number"]), np.ascontiguousarray(self.shards["digest"])


def _of(allowed: NDArray[np.bool_], shards: NDArray[np.int64]) -> NDArray[np.bool_]:
    inside = (shards >= 0) & (shards < len(allowed))
    return inside & allowed[np.where(inside, shards, 0)] if len(allowed) else inside


def index_path(store: Store) -> Path:
    """File of the index; it need not exist."""
    return store.path / "index" / "rows.bin"


def load_index(store: Store) -> RowIndex | None:
    """Map the index; None if there is none, or it is damaged or of another store."""
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
    """Write it, whole or not at all.

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
    plain = bytearray(head.tobytes())
    plain[8:12] = bytes(4)
    # An array, not a memoryview: the checksum library takes no writable buffer, but reads an array in place.
    return int(google_crc32c.extend(google_crc32c.value(bytes(plain)), np.asarray(body)))


def build_index(store: Store, shards: NDArray[Any], ids: NDArray[Any], places: NDArray[Any]) -> RowIndex:
    """Sort shards by number and rows by (digest, row)."""
    shards = shards[np.argsort(shards["number"], kind="stable")]
    order = np.lexsort((places, ids))
    return RowIndex(store.shard_size, shards, ids[order], places[order])


def read_shard_receipt(store: Store, shard: int) -> ShardReceipt:
    """The receipt of a finished shard, without a look at its files.

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
    """The receipt of a finished shard out of its file.

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
    """What an extraction receipt remembers of a shard: rows and file digests, not times."""
    return digest(receipt.model_dump(mode="json", include={"shard", "fingerprint", "rows", "files"}))


def refresh_index(store: Store) -> tuple[RowIndex, tuple[int, ...]]:
    """Bring the index to the state of the receipts, reading only those that are new or changed since.

    A store that cannot be written gets an index in memory.

    Returns:
        The index, and the shards whose receipts cannot be used.
    """
    old = load_index(store)
    found = _list_receipts(store)
    record = shard_record(len(store.layouts))
    empty = RowIndex(store.shard_size, np.zeros(0, record), np.zeros(0, "S32"), np.zeros(0, np.uint32))
    kept = empty if old is None else old
    columns = (kept.shards[name].tolist() for name in ("number", "receipt_bytes", "receipt_mtime"))
    stays = np.array([found.get(number) == (size, time) for number, size, time in zip(*columns, strict=True)], bool)
    known = set(kept.shards["number"][stays].tolist())
    shards, ids, places, broken = [], [], [], []
    for number in sorted(found.keys() - known):
        try:
            receipt = read_shard_receipt(store, number)
        except (CacheCorruptError, CacheIncompleteError):
            broken.append(number)
            continue
        lengths = tuple(receipt.files[name].bytes for name in store.layouts)
        key = np.frombuffer(bytes.fromhex(receipt_digest(receipt)), "V32")[0]
        shards.append((number, len(receipt.rows), receipt.seconds, key, *found[number], lengths))
        ids.append("".join(receipt.rows))
        places.append(number * store.shard_size + np.arange(len(receipt.rows), dtype=np.uint32))
    if old is not None and not shards and bool(stays.all()):
        return old, tuple(broken)
    lasting = np.isin(kept.places // store.shard_size, np.array(sorted(known), np.uint32))
    index = build_index(
        store,
        np.concatenate([kept.shards[stays], np.array(shards, record)]),
        np.concatenate([kept.ids[lasting], np.frombuffer(bytes.fromhex("".join(ids)), "S32")]),
        np.concatenate([kept.places[lasting], *places]).astype(np.uint32),
    )
    with suppress(StorageError):
        write_index(store, index)
    return index, tuple(broken)


def _list_receipts(store: Store) -> dict[int, tuple[int, int]]:
    """Shard number -> (length, time of change in ns) of its receipt."""
    found = {}
    with suppress(FileNotFoundError), os.scandir(store.receipts) as entries:
        for entry in entries:
            stem, dot, kind = entry.name.partition(".")
            if stem.isdecimal() and dot and kind == "json":
                # A receipt may go while the folder is listed.
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found[int(stem)] = (status.st_size, status.st_mtime_ns)
    return found


def mismatched_shards(store: Store, index: RowIndex, numbers: Sequence[int] | None = None) -> list[int]:
    """Shards of which the receipt or a file is missing or has another length than the index says.

    Args:
        store: The store.
        index: Of the store.
        numbers: Shards to look at, all of them in the index; None: all.
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
