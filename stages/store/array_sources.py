"""Read rows of one array: with `pread` if its bytes are stored raw, else through zarr-python."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from schemas.errors import CacheCorruptError, CacheIncompleteError, FptError
from schemas.features import CRC_BYTES
from schemas.urls import masked, secrets_in
from stages.files import read_regular
from stages.store.layout import ArrayLayout
from stages.store.shards import ShardFile

OPEN_FILES = 256
"""Open shard files per array: three arrays stay below the usual limit of 1,024 file handles per process."""
INDEXED_FILES = 16_384
"""Closed shard files per array whose index is kept in memory."""
CONCURRENT_ROWS = 32
"""Rows of one array that zarr fetches at the same time."""
DAMAGE = (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, EOFError)
"""Errors of zarr and its codecs about bytes that arrived but cannot be decoded; others mean that fetching failed."""
REPAIR = "Run `fpt extract --check`: it removes damaged shards and computes their images again."


class Source(Protocol):
    """Rows of one array."""

    direct: bool
    """Whether rows are read by `pread`."""

    def bind(self, shard: int, checksums: bytes) -> None:
        """Accept only rows with these checksums (`ShardReceipt.checksums`) from a shard; before its first read."""

    def read(self, rows: Sequence[int], out: NDArray[Any]) -> None:
        """Fill out[i] with row rows[i]."""

    def close(self) -> None:
        """Release every file handle."""


class DirectArray:
    """Shards of raw little-endian inner chunks with CRC32C on a local disk, as `stages.store.layout` defines them."""

    direct = True

    def __init__(self, folder: Path, layout: ArrayLayout, shard_size: int, chunks_per_row: int) -> None:
        """Open no file yet.

        Args:
            folder: Folder of the array.
            layout: Shape and type of one row.
            shard_size: Rows per shard.
            chunks_per_row: Inner chunks per row.
        """
        self._folder = str(folder)
        self._pattern = self._folder.replace("{", "{{").replace("}", "}}") + "/c.{}" + ".0" * len(layout.shape)
        self._shard_size, self._chunks_per_row = shard_size, chunks_per_row
        self._bytes = math.prod(layout.shape) * np.dtype(layout.dtype).itemsize // chunks_per_row
        self._open_files: OrderedDict[int, ShardFile] = OrderedDict()
        self._indexed_files: OrderedDict[int, ShardFile] = OrderedDict()
        self._checksums: dict[int, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": OrderedDict(), "_indexed_files": OrderedDict(), "_checksums": {}}

    def bind(self, shard: int, checksums: bytes) -> None:
        """Accept only rows with these checksums from a shard; before its first read."""
        self._checksums[shard] = checksums

    def read(self, rows: Sequence[int], out: NDArray[Any]) -> None:
        """Fill out[i] with row rows[i].

        Rows in the page cache are read first; read-ahead is requested for all others before the first of them is read.
        """
        targets = out.reshape(len(rows) * self._chunks_per_row, -1).view(np.uint8)
        cold: list[tuple[ShardFile, int, NDArray[np.uint8]]] = []
        for position, row in enumerate(rows):
            shard, slot = divmod(row, self._shard_size)
            file = self._file(shard)
            for step in range(self._chunks_per_row):
                chunk = slot * self._chunks_per_row + step
                target = targets[position * self._chunks_per_row + step]
                if not file.read_cached(chunk, target):
                    cold.append((file, chunk, target))
        if len(cold) > 1:
            for file, chunk, _ in cold:
                file.open()
                file.prefetch(chunk)
        for file, chunk, target in cold:
            file.open()
            file.read_into(chunk, target)
        if self._chunks_per_row > 1:
            # Receipts hold one checksum per row, so chunks smaller than a row are only compared once it is complete.
            require_checksums(self._folder, rows, out, self._checksums, self._shard_size, REPAIR)
        self._trim()

    def close(self) -> None:
        """Release every file handle."""
        while self._open_files:
            self._open_files.popitem()[1].close()

    def open_files(self) -> int:
        """Return the number of open file handles."""
        return len(self._open_files)

    def stored_checksums(self, shard: int, slots: Iterable[int]) -> bytes | None:
        """Read the checksums stored with some rows of a shard, and compare them with its receipt if it is bound to one.

        Returns:
            Big-endian, 4 bytes per row; None if rows have several chunks, and so no single checksum.

        Raises:
            CacheIncompleteError: If the file or one of its rows is gone.
            CacheCorruptError: If it is damaged, or not the file that its receipt describes.
        """
        if self._chunks_per_row > 1:
            return None
        file = self._open(shard)
        try:
            return b"".join(file.stored_checksum(slot) for slot in slots)
        finally:
            file.close()

    def _file(self, shard: int) -> ShardFile:
        file = self._open_files.get(shard)
        if file is not None:
            return file
        file = self._indexed_files.get(shard)
        if file is None:
            file = self._indexed_files[shard] = self._open(shard)
        else:
            file.open()
        self._open_files[shard] = file
        return file

    def _open(self, shard: int) -> ShardFile:
        checksums = self._checksums.get(shard) if self._chunks_per_row == 1 else None
        return ShardFile(self._pattern.format(shard), self._shard_size * self._chunks_per_row, self._bytes, checksums)

    def _trim(self) -> None:
        while len(self._open_files) > OPEN_FILES:
            self._open_files.popitem(last=False)[1].close()
        while len(self._indexed_files) > INDEXED_FILES:
            shard, file = self._indexed_files.popitem(last=False)
            file.close()
            self._open_files.pop(shard, None)


class ZarrArray:
    """Arrays with any other codec, chunking or location, read through zarr-python one row at a time."""

    direct = False

    def __init__(
        self,
        group: str,
        name: str,
        layout: ArrayLayout,
        shard_size: int,
        repair: str = REPAIR,
        remote: bool = False,
    ) -> None:
        """Open no file yet.

        Args:
            group: Path or URL of the Zarr group.
            name: Name of the array.
            layout: Required shape and type of one row.
            shard_size: Rows per shard.
            repair: Advice in the error about a damaged array.
            remote: Whether reading can fail for other reasons than damage.
        """
        self._group, self._name, self._layout, self._repair, self._remote = group, name, layout, repair, remote
        self._shown, self._shard_size = masked(f"{group}/{name}"), shard_size
        self._array: Any = None
        self._present: set[str] = set()
        self._checksums: dict[int, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None, "_present": set()}

    def bind(self, shard: int, checksums: bytes) -> None:
        """Accept only rows with these checksums from a shard."""
        self._checksums[shard] = checksums

    def read(self, rows: Sequence[int], out: NDArray[Any]) -> None:
        """Fill out[i] with row rows[i].

        Raises:
            CacheIncompleteError: If a chunk of a row was never written.
            CacheCorruptError: If zarr cannot decode it.
            TransferError: If the remote side cannot be reached.
        """
        from zarr.core.sync import sync

        try:
            if self._array is None:
                self._array = self._open()
            sync(self._read(rows, out))
        except FptError:
            raise
        except Exception as error:  # zarr and its codecs raise many types
            if self._remote and not isinstance(error, (*DAMAGE, FileNotFoundError)):
                from stages.store.remote import as_transfer_error

                raise as_transfer_error(f"{self._group}/{self._name}", error) from error
            raise CacheCorruptError(
                f"The array {self._shown} cannot be read: {masked(str(error), secrets_in(self._group))}",
                self._name,
                "Its bytes or its metadata changed after they were written.",
                self._repair,
            ) from error
        require_checksums(self._shown, rows, out, self._checksums, self._shard_size, self._repair)

    def close(self) -> None:
        """Drop the opened array."""
        self._array = None

    def _open(self) -> Any:
        import zarr

        array: Any = zarr.open_array(f"{self._group}/{self._name}", mode="r")
        if array.shape[1:] != self._layout.shape or array.dtype != np.dtype(self._layout.dtype):
            raise CacheCorruptError(
                f"The array {self._shown} has rows {array.shape[1:]} of {array.dtype} instead of"
                f" {self._layout.shape} of {self._layout.dtype}.",
                self._name,
                "It was written for other features, or its metadata was changed.",
                self._repair,
            )
        return array

    async def _read(self, rows: Sequence[int], out: NDArray[Any]) -> None:
        """Read one slice per row, many at a time: within one slice zarr reads the chunks of a shard sequentially."""
        limit = asyncio.Semaphore(CONCURRENT_ROWS)

        async def read(position: int, row: int) -> None:
            async with limit:
                await self._require(row)
                out[position] = await self._array.async_array.getitem(row)

        await asyncio.gather(*(read(position, row) for position, row in enumerate(rows)))

    async def _require(self, row: int) -> None:
        """Check that every chunk of a row exists: zarr returns the fill value for a missing one."""
        if not 0 <= row < self._array.shape[0]:
            raise self._missing(row)
        grid = self._array.shards or self._array.chunks
        cells = [range(-(-length // step)) for length, step in zip(self._layout.shape, grid[1:], strict=True)]
        keys: list[tuple[int, ...]] = [(row // grid[0],)]
        for cell in cells:
            keys = [(*key, index) for key in keys for index in cell]
        for key in keys:
            name = self._array.metadata.encode_chunk_key(key)
            if name not in self._present:
                if not await (self._array.store_path / name).exists():
                    raise self._missing(row)
                self._present.add(name)

    def _missing(self, row: int) -> CacheIncompleteError:
        return CacheIncompleteError(
            f"Row {row} of {self._shown} was never written, or only in part.",
            (self._name,),
            "A chunk is missing; other programs may leave out chunks of zeros when they write a store.",
            f"{self._repair} Other programs: write with `write_empty_chunks`.",
        )


def row_checksum(row: NDArray[Any]) -> bytes:
    """Return the CRC32C of a row's little-endian bytes as 4 big-endian bytes."""
    row = np.ascontiguousarray(row, row.dtype.newbyteorder("<"))
    return int(google_crc32c.value(row.reshape(-1).view(np.uint8))).to_bytes(CRC_BYTES, "big")


def require_checksums(
    place: str, rows: Sequence[int], decoded: NDArray[Any], checksums: Mapping[int, bytes], shard_size: int, repair: str
) -> None:
    """Compare decoded rows with the checksums of their receipts; shards without checksums are skipped.

    Args:
        place: Folder or URL of the array, for the message.
        rows: Positions of the rows.
        decoded: (len(rows), ...) their values.
        checksums: Shard number -> checksums of its rows (`ShardReceipt.checksums`).
        shard_size: Rows per shard.
        repair: Advice in the error.

    Raises:
        CacheCorruptError: If a row is not the one that its receipt describes.
    """
    for row, values in zip(rows, decoded, strict=True):
        shard, slot = divmod(row, shard_size)
        expected = checksums.get(shard)
        if expected is not None and row_checksum(values) != expected[CRC_BYTES * slot : CRC_BYTES * (slot + 1)]:
            raise CacheCorruptError(
                f"Row {slot} of shard {shard} in {place} does not match its receipt.",
                str(shard),
                "The file may belong to another shard, or its bytes changed after they were written.",
                repair,
            )


def open_source(group: Path, name: str, layout: ArrayLayout, shard_size: int) -> Source:
    """Return the fastest source that the metadata of an array allows.

    Raises:
        CacheIncompleteError: If the array has no metadata.
        CacheCorruptError: If its metadata is not JSON.
    """
    path = group / name / "zarr.json"
    try:
        metadata = json.loads(read_regular(path))
    except FileNotFoundError:
        raise CacheIncompleteError(f"The metadata {path} is gone.", (name,), repair=REPAIR) from None
    except (OSError, ValueError):
        raise CacheCorruptError(
            f"The metadata {path} cannot be read.",
            name,
            "The file was changed.",
            "Run `fpt cache verify --repair`: it writes the metadata again.",
        ) from None
    chunks_per_row = raw_chunks_per_row(metadata, layout, shard_size)
    if chunks_per_row and sys.byteorder == "little" and hasattr(os, "preadv"):
        return DirectArray(group / name, layout, shard_size, chunks_per_row)
    return ZarrArray(str(group), name, layout, shard_size)


def raw_chunks_per_row(metadata: Any, layout: ArrayLayout, shard_size: int) -> int:
    """Return the number of inner chunks per row if the metadata describes raw rows in shards, else 0."""
    number = np.dtype(layout.dtype)
    raw: dict[str, Any] = {"name": "bytes"}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = [[little, {"name": "crc32c"}]] + ([[raw, {"name": "crc32c"}]] if number.itemsize == 1 else [])
    try:
        shape, (sharding,) = list(layout.shape), metadata["codecs"]
        inner = sharding["configuration"]["chunk_shape"]
        fits = (
            metadata["data_type"] == number.name
            and metadata["shape"][1:] == shape
            and metadata["chunk_grid"]["configuration"]["chunk_shape"] == [shard_size, *shape]
            and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
            and sharding["name"] == "sharding_indexed"
            and sharding["configuration"]["codecs"] in plain
            and sharding["configuration"]["index_codecs"] == [little, {"name": "crc32c"}]
            and sharding["configuration"]["index_location"] == "end"
            and inner[0] == 1
        )
    except (KeyError, TypeError, ValueError):
        return 0
    # Chunks that split a row along its leading axes only are contiguous runs of its bytes.
    lead = next((n for n in range(len(shape) + 1) if inner[1:] == [1] * n + shape[n:]), None)
    return math.prod(shape[:lead]) if fits and lead is not None else 0
