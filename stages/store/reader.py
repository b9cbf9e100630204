"""Reading rows by image id. Readers trust receipts, never the mere presence of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ExtractionReceipt, ShardReceipt
from stages.store.array_sources import DirectArray, Source, open_source
from stages.store.index import (
    ID_BYTES,
    RowIndex,
    load_index,
    mismatched_shards,
    read_shard_receipt,
    receipt_digest,
    refresh_index,
)
from stages.store.layout import Store, open_store_layout, store_path
from stages.store.shards import REPAIR

__all__ = ["StoreReader", "open_store", "read_receipt", "receipt_digest"]


class StoreReader:
    """Random access to the rows of a store.

    Opening reads no receipt: that of a shard, and the lengths of its files, are compared when a row of it is read for
    the first time. File handles are opened on first use and never carried into another process by pickling; `pread`
    keeps no position, so a forked worker may share them.
    """

    def __init__(
        self,
        store: Store,
        expected: Mapping[str, str],
        index: RowIndex,
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        """Use `open_store` instead, which finds the index.

        Args:
            store: The store.
            expected: Shard number -> digest of its receipt, as in the extraction receipt.
            index: Covers these shards.
            sources: Of every array; None: the files of the store.
        """
        self.store, self._expected = store, dict(expected)
        self._layouts = store.layouts
        self._sources: dict[str, Source] = dict(sources or {}) or {
            name: open_source(store.group, name, layout, store.shard_size) for name, layout in self._layouts.items()
        }
        self._index: RowIndex | None = index
        self._checked: dict[int, bytes] = {}
        self._compared: set[int] = set()
        numbers = np.fromiter(map(int, self._expected), np.int64, len(self._expected))
        self._allowed = np.zeros(int(numbers.max(initial=-1)) + 1, bool)
        self._allowed[numbers] = True

    def __len__(self) -> int:
        shards = self.index.shards
        numbers = shards["number"]
        inside = numbers < len(self._allowed)
        return int(shards["rows"][inside][self._allowed[numbers[inside]]].sum())

    def __contains__(self, image_id: str) -> bool:
        return bool(self.find([image_id])[0] >= 0)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the mapped index would weigh tens of megabytes; its file is there for every process.
        return {**self.__dict__, "_index": None, "_checked": {}}

    @property
    def index(self) -> RowIndex:
        """Where every row lies."""
        if self._index is None:
            self._index = _covering_index(self.store, self._expected)
        return self._index

    @property
    def url(self) -> str | None:
        """Of a store that is read in place behind one; None: a folder."""
        return None

    @property
    def place(self) -> str:
        """Where the store is."""
        return str(self.store.path)

    @property
    def direct(self) -> bool:
        """Whether every array is read by `pread`; else some go through zarr."""
        return all(source.direct for source in self._sources.values())

    @property
    def layouts(self) -> dict[str, Any]:
        """Shape and type of one row of each array."""
        return dict(self._layouts)

    def find(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Row of each image, -1 where there is none; for `read_rows`."""
        return self.index.find(ids, self._allowed)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """The images that have no row here."""
        return [ids[position] for position in np.flatnonzero(self.find(ids) < 0).tolist()]

    def locate(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Row of each image; for `read_rows`.

        Raises:
            CacheIncompleteError: If an image has no row.
        """
        rows = self.find(ids)
        if len(rows) and int(rows.min()) < 0:
            missing = [ids[position] for position in np.flatnonzero(rows < 0).tolist()]
            raise CacheIncompleteError(
                f"The store {self.place} has no features of image {missing[0][:16]}.",
                missing,
                "The image was added after the features were extracted.",
                REPAIR,
            )
        return rows

    def read(
        self, ids: Sequence[str], names: Iterable[str], out: dict[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read rows in the order of `ids`.

        Args:
            ids: Image ids, repeats allowed.
            names: Arrays to read: keys, values, indices, pooled, side.
            out: Buffers to fill and return slices of, by name, each with at least len(ids) rows; a fresh
                buffer of tens of megabytes a batch costs more than the read.

        Returns:
            name -> (len(ids), ...), in the type of the store.

        Raises:
            CacheIncompleteError: If an image has no row.
            CacheCorruptError: If bytes changed since they were written.
        """
        return self.read_rows(self.locate(ids), ids, names, out)

    def read_rows(
        self,
        rows: NDArray[np.int64],
        ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Like `read`, for images that were located before."""
        names, places = tuple(names), rows.tolist()
        for row, image_id in zip(places, ids, strict=True):
            shard, slot = divmod(row, self.store.shard_size)
            held = self._checked.get(shard) or self._check(shard)
            if held[slot * ID_BYTES : (slot + 1) * ID_BYTES] != bytes.fromhex(image_id):
                raise self._other_row(row, image_id)
        if not all(self._sources[name].direct for name in names):
            self._compare(places, ids)
        result = {}
        for name in names:
            layout = self._layouts[name]
            if out is not None and name in out:
                target = out[name][: len(ids)]
            else:
                target = np.empty((len(ids), *layout.shape), layout.dtype)
            result[name] = target
        if places:
            self._fill(places, result)
        return result

    def require_complete(self) -> None:
        """Check that every shard of the extraction receipt is there with its receipt and its lengths; reads neither.

        Raises:
            CacheIncompleteError: If a receipt or a file is gone.
            CacheCorruptError: If one was changed.
        """
        for number in mismatched_shards(self.store, self.index, [int(number) for number in self._expected]):
            self._check(number)

    def open_files(self) -> int:
        """How many file handles are held."""
        return sum(source.open_files() for source in self._sources.values() if isinstance(source, DirectArray))

    def close(self) -> None:
        """Release every file handle."""
        for source in self._sources.values():
            source.close()

    def _fill(self, rows: Sequence[int], targets: Mapping[str, NDArray[Any]]) -> None:
        """Read rows of several arrays."""
        for name, target in targets.items():
            self._sources[name].read(rows, target)

    def _compare(self, rows: Sequence[int], ids: Sequence[str]) -> None:
        """Another layout has its own idea of where row n lies: it must be the row of this image there."""
        fresh = {row: image_id for row, image_id in zip(rows, ids, strict=True) if row not in self._compared}
        digests = np.empty((len(fresh), ID_BYTES), np.uint8)
        if fresh:
            self._sources["sha256"].read(list(fresh), digests)
        for (row, image_id), found in zip(fresh.items(), digests, strict=True):
            if found.tobytes().hex() != image_id:
                raise self._other_row(row, image_id)
        self._compared.update(fresh)

    def _other_row(self, row: int, image_id: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"Row {row} of {self.store.path} is not the one of image {image_id[:16]}.",
            str(row // self.store.shard_size),
            "The index of rows or the metadata of the store was changed.",
            f"Delete {self.store.path / 'index'}, which is made again, and run `fpt extract --check`.",
        )

    def _bind(self, receipt: ShardReceipt) -> None:
        """Have every source compare what it reads of a shard with the checksums of the receipt."""
        for name, source in self._sources.items():
            checksums = receipt.checksums(name)
            if checksums is not None:
                source.bind(receipt.shard, checksums)

    def _check(self, shard: int) -> bytes:
        """Compare a shard with the extraction receipt, before the first of its rows is read."""
        receipt = read_receipt(self.store, shard)
        if receipt_digest(receipt) != self._expected.get(str(shard)):
            raise _foreign(self.store, str(shard))
        self._bind(receipt)
        self._checked[shard] = bytes.fromhex("".join(receipt.rows))
        return self._checked[shard]


def read_receipt(store: Store, shard: int) -> ShardReceipt:
    """The receipt of a finished shard, checked against the sizes of its files.

    Raises:
        CacheIncompleteError: If the receipt or a file is gone.
        CacheCorruptError: If the receipt is damaged or a file has another length.
    """
    receipt = read_shard_receipt(store, shard)
    for name, expected in receipt.files.items():
        file = store.shard_name(name, shard)
        try:
            length = os.stat(file).st_size  # noqa: PTH116  (a Path a file is a third of the time)
        except (FileNotFoundError, NotADirectoryError):
            missing = (Path(file).name,)
            raise CacheIncompleteError(f"The shard file {file} is gone.", missing, repair=REPAIR) from None
        if length != expected.bytes:
            raise CacheCorruptError(
                f"The shard file {file} has {length} bytes instead of {expected.bytes}.",
                Path(file).name,
                repair=REPAIR,
            )
    return receipt


def open_store(cache_root: Path, receipt: ExtractionReceipt) -> StoreReader:
    """Open the store behind an extraction receipt. Takes milliseconds, however many rows it has.

    Shards are compared with the receipt when they are first read; `StoreReader.require_complete` looks at all of them.

    Raises:
        CacheIncompleteError: If the store or a receipt is gone.
        CacheCorruptError: If a receipt was changed.
        CacheMismatchError: If the folder holds other features.
    """
    try:
        store = open_store_layout(cache_root, receipt.spec)
    except FileNotFoundError:
        path = store_path(cache_root, receipt.fingerprint)
        raise CacheIncompleteError(
            f"The feature store {path} behind the extraction receipt is gone.",
            cause="It was deleted, or FPT_CACHE_DIR points to another place than during the extraction.",
            repair=REPAIR,
        ) from None
    if not all(number.isdecimal() for number in receipt.shards):
        raise CacheCorruptError("The extraction receipt names a shard that is no number.", repair="Run `fpt extract`.")
    return StoreReader(store, receipt.shards, _covering_index(store, receipt.shards))


def _covering_index(store: Store, expected: Mapping[str, str]) -> RowIndex:
    """The index on the disk where it fits an extraction receipt, else one made anew from the receipts."""
    index = load_index(store)
    if index is None or not index.covers(expected):
        index, _ = refresh_index(store)
    if not index.covers(expected):
        here = index.digests()
        for number, digest in expected.items():
            if here.get(int(number)) != digest:
                read_receipt(store, int(number))
                raise _foreign(store, number)
    return index


def _foreign(store: Store, shard: str) -> CacheCorruptError:
    return CacheCorruptError(
        f"Shard {shard} of {store.path} is not the one that this study extracted.",
        shard,
        "The store was rebuilt or changed since.",
        "Run `fpt extract`: it writes a new extraction receipt.",
    )
