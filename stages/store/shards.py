"""Read one shard file: its index once, then rows with `pread` directly into the caller's buffer.

The index of a Zarr v3 shard lies at the end of the file: (offset, length) of each inner chunk as little-endian
uint64, then a CRC32C. Each inner chunk ends with the CRC32C of its bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import CRC_BYTES
from stages.files import open_regular

REPAIR = "Run `fpt extract`: it computes what is missing."
"""Advice in errors about missing receipts, files and chunks."""
ABSENT = np.uint64(2**64 - 1)
NOWAIT = getattr(os, "RWF_NOWAIT", 0)
"""Flag of a read that fails instead of waiting for the disk; 0 on systems without it."""
READ_AHEAD = 128 * 1024
"""Bytes per read-ahead request: the kernel may shorten a longer one to the read-ahead window of the disk."""


class ShardFile:
    """One shard of one array. The file handle is opened on demand and may be closed in between."""

    def __init__(self, path: str, chunks: int, chunk_bytes: int, checksums: bytes | None = None) -> None:
        """Open the file and check its index.

        Args:
            path: The shard file.
            chunks: Required number of inner chunks in the index.
            chunk_bytes: Length of a chunk without its checksum.
            checksums: CRC32C of each chunk from the receipt (`ShardReceipt.checksums`), or None to skip the comparison.

        Raises:
            CacheIncompleteError: If the file does not exist.
            CacheCorruptError: If the index is damaged or points outside the file.
        """
        self.path, self._chunk_bytes, self._fd = path, chunk_bytes, -1
        self._expected = checksums
        self._length: int | None = None
        self._stored = bytearray(CRC_BYTES)
        self.open()
        try:
            self._offsets: list[int] = self._read_index(chunks)
        except BaseException:
            self.close()
            raise
        # The checksum of a chunk is verified on its first read only.
        self._checked = bytearray(chunks)

    def open(self) -> None:
        """Open the file unless it is open already.

        Raises:
            CacheIncompleteError: If the file is gone.
            CacheCorruptError: If it cannot be opened, or has another length than before.
        """
        if self._fd >= 0:
            return
        try:
            self._fd = open_regular(self.path)
        except FileNotFoundError:
            raise CacheIncompleteError(
                f"The shard {self.path} is gone.",
                (Path(self.path).name,),
                "The store was changed after its receipt was written.",
                REPAIR,
            ) from None
        except OSError as error:
            raise self._corrupt(f"it cannot be opened ({error.strerror})") from error
        length = os.fstat(self._fd).st_size
        if self._length not in (None, length):
            self.close()
            raise self._corrupt("its length changed while it was in use")
        self._length = length

    def close(self) -> None:
        """Release the file handle; the index and the record of verified chunks stay in memory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_cached(self, chunk: int, target: NDArray[np.uint8]) -> bool:
        """Fill `target` with a verified chunk from the page cache; return False if the read would have to wait."""
        if not NOWAIT or not self._checked[chunk]:
            return False
        try:
            buffers: list[Any] = [target]
            return os.preadv(self._fd, buffers, self._offsets[chunk], NOWAIT) == self._chunk_bytes
        except OSError:  # EAGAIN; a file system without the flag refuses it
            return False

    def prefetch(self, chunk: int) -> None:
        """Request read-ahead of a chunk without waiting for it."""
        start = self._offsets[chunk]
        if start < 0 or not hasattr(os, "posix_fadvise"):
            return
        stop = start + self._chunk_bytes + CRC_BYTES
        for begin in range(start, stop, READ_AHEAD):
            os.posix_fadvise(self._fd, begin, min(READ_AHEAD, stop - begin), os.POSIX_FADV_WILLNEED)

    def read_into(self, chunk: int, target: NDArray[np.uint8]) -> None:
        """Fill `target` (chunk_bytes long, contiguous) with one chunk.

        Raises:
            CacheIncompleteError: If the chunk was never written.
            CacheCorruptError: If its checksum does not match its bytes or the receipt.
        """
        offset = self._offset(chunk)
        length = self._chunk_bytes
        buffers: list[Any] = [target]
        if not self._checked[chunk]:
            buffers.append(self._stored)
            length += CRC_BYTES
        try:
            read = os.preadv(self._fd, buffers, offset)
        except OSError as error:
            raise self._corrupt(f"chunk {chunk} cannot be read ({error.strerror})") from error
        if read != length:
            raise self._corrupt(f"chunk {chunk} is cut off")
        if not self._checked[chunk]:
            # Pass the array itself: google_crc32c would copy its memoryview.
            checksum = google_crc32c.value(target)
            if checksum != int.from_bytes(self._stored, "little"):
                raise self._corrupt(f"the checksum of chunk {chunk} does not match its bytes")
            self._require_expected(chunk, checksum.to_bytes(CRC_BYTES, "big"))
            self._checked[chunk] = 1

    def stored_checksum(self, chunk: int) -> bytes:
        """Read the CRC32C that follows a chunk, big-endian, without the chunk itself.

        Raises:
            CacheIncompleteError: If the chunk was never written.
            CacheCorruptError: If it cannot be read, or does not match the receipt.
        """
        try:
            stored = os.pread(self._fd, CRC_BYTES, self._offset(chunk) + self._chunk_bytes)
        except OSError as error:
            raise self._corrupt(f"chunk {chunk} cannot be read ({error.strerror})") from error
        self._require_expected(chunk, stored[::-1])
        return stored[::-1]

    def _require_expected(self, chunk: int, checksum: bytes) -> None:
        if self._expected is not None and checksum != self._expected[CRC_BYTES * chunk : CRC_BYTES * (chunk + 1)]:
            raise self._corrupt(f"row {chunk} does not match its receipt; the file may belong to another shard")

    def _offset(self, chunk: int) -> int:
        offset = self._offsets[chunk]
        if offset < 0:
            raise CacheIncompleteError(
                f"Chunk {chunk} of the shard {self.path} was never written.",
                (Path(self.path).name,),
                repair=REPAIR,
            )
        return offset

    def _read_index(self, chunks: int) -> list[int]:
        length = self._length or 0
        index_bytes = 16 * chunks
        start = length - index_bytes - CRC_BYTES
        tail = os.pread(self._fd, index_bytes + CRC_BYTES, max(start, 0))
        if start < 0 or google_crc32c.value(tail[:-CRC_BYTES]) != int.from_bytes(tail[-CRC_BYTES:], "little"):
            raise self._corrupt("its index is damaged or cut off")
        index = np.frombuffer(tail, "<u8", count=2 * chunks).reshape(chunks, 2)
        present = index[:, 0] != ABSENT
        fits = (index[:, 1] == self._chunk_bytes + CRC_BYTES) & (index[:, 0] + index[:, 1] <= start)
        if not bool(fits[present].all()):
            raise self._corrupt("its index does not match the layout of the store")
        offsets: list[int] = (np.where(present, index[:, 0], 0).astype(np.int64) - np.where(present, 0, 1)).tolist()
        return offsets

    def _corrupt(self, damage: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"The shard {self.path} is damaged: {damage}.",
            self.path,
            "The disk or a copy changed bytes after they were written.",
            "Run `fpt extract --check`: it removes damaged shards and computes their images again.",
        )
