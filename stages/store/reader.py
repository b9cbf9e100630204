"""Read rows by row id. Readers trust receipts, never the mere presence of a file."""

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

    Opening reads no receipt. The receipt of a shard and the lengths of its files are checked when one of its rows is
    read for the first time. File handles are opened on first use and are not pickled; `pread` keeps no position, so
    forked workers may share them.
    """

    def __init__(
        self,
        store: Store,
        expected: Mapping[str, str],
        index: RowIndex,
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        """Use `open_store` instead, which loads the index.

        Args:
            store: The store.
            expected: Shard number -> digest of its receipt, as in the extraction receipt.
            index: Row index that covers these shards.
            sources: Source of every array; by default the files of the store.
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

    def __contains__(self, row_id: str) -> bool:
        return bool(self.find([row_id])[0] >= 0)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the memory-mapped index would take tens of megabytes; every process can map the file itself.
        return {**self.__dict__, "_index": None, "_checked": {}}

    @property
    def index(self) -> RowIndex:
        """Position of every row."""
        if self._index is None:
            self._index = _covering_index(self.store, self._expected)
        return self._index

    @property
    def url(self) -> str | None:
        """URL of a store that is read in place; None for a folder."""
        return None

    @property
    def place(self) -> str:
        """Folder or URL of the store."""
        return str(self.store.path)

    @property
    def direct(self) -> bool:
        """Whether every array is read by `pread`, none through zarr."""
        return all(source.direct for source in self._sources.values())

    @property
    def layouts(self) -> dict[str, Any]:
        """Shape and type of one row of each array."""
        return dict(self._layouts)

    def find(self, row_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each row (n,) for `read_rows`, -1 for rows that the store lacks."""
        return self.index.find(row_ids, self._allowed)

    def missing(self, row_ids: Sequence[str]) -> list[str]:
        """Return the row ids that the store lacks."""
        return [row_ids[at] for at in np.flatnonzero(self.find(row_ids) < 0).tolist()]

    def locate(self, row_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each row (n,) for `read_rows`.

        Raises:
            CacheIncompleteError: If the store lacks a row.
        """
        rows = self.find(row_ids)
        if len(rows) and int(rows.min()) < 0:
            missing = [row_ids[at] for at in np.flatnonzero(rows < 0).tolist()]
            raise CacheIncompleteError(
                f"The store {self.place} has no features of image {missing[0][:16]}.",
                missing,
                "The image was added after the features were extracted.",
                REPAIR,
            )
        return rows

    def read(
        self, row_ids: Sequence[str], names: Iterable[str], out: dict[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read rows in the order of `row_ids`.

        Args:
            row_ids: Row ids, repeats allowed.
            names: Arrays to read: keys, values, indices, pooled, side.
            out: Buffers to fill, by array name, each with room for len(row_ids) rows; slices of them are returned.
                Allocating tens of megabytes per batch would take longer than the read itself.

        Returns:
            Array name -> (len(row_ids), ...), in the type of the store.

        Raises:
            CacheIncompleteError: If the store lacks a row.
            CacheCorruptError: If bytes changed since they were written.
        """
        return self.read_rows(self.locate(row_ids), row_ids, names, out)

    def read_rows(
        self,
        rows: NDArray[np.int64],
        row_ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Read rows whose positions are known already; like `read` otherwise."""
        names, positions = tuple(names), rows.tolist()
        for row, row_id in zip(positions, row_ids, strict=True):
            shard, slot = divmod(row, self.store.shard_size)
            shard_ids = self._checked.get(shard) or self._check(shard)
            if shard_ids[slot * ID_BYTES : (slot + 1) * ID_BYTES] != bytes.fromhex(row_id):
                raise self._other_row(row, row_id)
        if not all(self._sources[name].direct for name in names):
            self._compare(positions, row_ids)
        result = {}
        for name in names:
            layout = self._layouts[name]
            if out is not None and name in out:
                target = out[name][: len(row_ids)]
            else:
                target = np.empty((len(row_ids), *layout.shape), layout.dtype)
            result[name] = target
        if positions:
            self._fill(positions, result)
        return result

    def require_complete(self) -> None:
        """Check that the receipt and the files of every shard exist with the recorded lengths; reads none of them.

        Raises:
            CacheIncompleteError: If a receipt or a file is gone.
            CacheCorruptError: If one was changed.
        """
        for number in mismatched_shards(self.store, self.index, [int(number) for number in self._expected]):
            self._check(number)

    def open_files(self) -> int:
        """Return the number of open file handles."""
        return sum(source.open_files() for source in self._sources.values() if isinstance(source, DirectArray))

    def close(self) -> None:
        """Release every file handle."""
        for source in self._sources.values():
            source.close()

    def _fill(self, rows: Sequence[int], targets: Mapping[str, NDArray[Any]]) -> None:
        """Read the rows of several arrays."""
        for name, target in targets.items():
            self._sources[name].read(rows, target)

    def _compare(self, rows: Sequence[int], row_ids: Sequence[str]) -> None:
        """Check the stored row ids: under another layout row n may be somewhere else."""
        unchecked = {row: row_id for row, row_id in zip(rows, row_ids, strict=True) if row not in self._compared}
        stored_ids = np.empty((len(unchecked), ID_BYTES), np.uint8)
        if unchecked:
            self._sources["sha256"].read(list(unchecked), stored_ids)
        for (row, row_id), stored_id in zip(unchecked.items(), stored_ids, strict=True):
            if stored_id.tobytes().hex() != row_id:
                raise self._other_row(row, row_id)
        self._compared.update(unchecked)

    def _other_row(self, row: int, row_id: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"Row {row} of {self.store.path} is not the one of image {row_id[:16]}.",
            str(row // self.store.shard_size),
            "The index of rows or the metadata of the store was changed.",
            f"Delete {self.store.path / 'index'}, which is rebuilt, and run `fpt extract --check`.",
        )

    def _bind(self, receipt: ShardReceipt) -> None:
        """Make every source compare the rows it reads from a shard with the checksums of the receipt."""
        for name, source in self._sources.items():
            checksums = receipt.checksums(name)
            if checksums is not None:
                source.bind(receipt.shard, checksums)

    def _check(self, shard: int) -> bytes:
        """Compare a shard with the extraction receipt before its first row is read; return its row ids (bytes)."""
        receipt = read_receipt(self.store, shard)
        if receipt_digest(receipt) != self._expected.get(str(shard)):
            raise _foreign(self.store, str(shard))
        self._bind(receipt)
        self._checked[shard] = bytes.fromhex("".join(receipt.rows))
        return self._checked[shard]


def read_receipt(store: Store, shard: int) -> ShardReceipt:
    """Read the receipt of a finished shard and check it against the sizes of its files.

    Raises:
        CacheIncompleteError: If the receipt or a file is gone.
        CacheCorruptError: If the receipt is damaged or a file has another length.
    """
    receipt = read_shard_receipt(store, shard)
    for name, expected in receipt.files.items():
        file = store.shard_name(name, shard)
        try:
            length = os.stat(file).st_size  # noqa: PTH116  (constructing a Path would take a third of the time)
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
    """Open the store that an extraction receipt describes; takes milliseconds for any number of rows.

    Shards are compared with the receipt when they are first read; `StoreReader.require_complete` checks all of them.

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
            f"The feature store {path} of the extraction receipt is gone.",
            cause="It was deleted, or FPT_CACHE_DIR points to another place than during the extraction.",
            repair=REPAIR,
        ) from None
    if not all(number.isdecimal() for number in receipt.shards):
        raise CacheCorruptError(
            "The extraction receipt names a shard that is not a number.", repair="Run `fpt extract`."
        )
    return StoreReader(store, receipt.shards, _covering_index(store, receipt.shards))


def _covering_index(store: Store, expected: Mapping[str, str]) -> RowIndex:
    """Return the stored index if it covers an extraction receipt, else rebuild it from the shard receipts."""
    index = load_index(store)
    if index is None or not index.covers(expected):
        index, _ = refresh_index(store)
    if not index.covers(expected):
        indexed = index.digests()
        for number, digest in expected.items():
            if indexed.get(int(number)) != digest:
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
