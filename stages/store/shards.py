"""Reading one shard file: its index once, then rows by `pread` straight into the caller's buffer.

The index of a Zarr v3 shard lies at the end of the file: (offset, length) of each inner chunk as little-endian
uint64, then a CRC32C. Each inner chunk ends with the CRC32C of its bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from schemas.errors import CacheCorruptError, CacheIncompleteError

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)


class ShardFile:
    """One open shard of one array."""

    def __init__(self, path: Path, chunks: int, chunk_bytes: int) -> None:
        """Open the file and check its index.

        Args:
            path: The shard file.
            chunks: Inner chunks that the index must have.
            chunk_bytes: Length of a chunk without its checksum.

        Raises:
            CacheIncompleteError: If the file is not there.
            CacheCorruptError: If the index is damaged or points outside the file.
        """
        self.path, self._chunk_bytes = path, chunk_bytes
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise CacheIncompleteError(
                f"The shard {path} is gone.",
                (path.name,),
                "The store was changed after its receipt was written.",
                "Run `fpt extract`: it computes what is missing.",
            ) from None
        try:
            self._offsets = self._read_index(chunks)
        except BaseException:
            self.close()
            raise
        # A chunk is checked the first time it is read; later reads of a checked chunk are plain copies.
        self._checked = np.zeros(chunks, dtype=bool)

    def close(self) -> None:
        """Release the file handle."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, chunk: int, target: memoryview) -> None:
        """Fill `target` (chunk_bytes long, writable) with one chunk.

        Raises:
            CacheIncompleteError: If the chunk was never written.
            CacheCorruptError: If its checksum does not fit.
        """
        offset = int(self._offsets[chunk])
        if offset < 0:
            raise CacheIncompleteError(
                f"Chunk {chunk} of the shard {self.path} was never written.",
                (self.path.name,),
                repair="Run `fpt extract`: it computes what is missing.",
            )
        if self._checked[chunk]:
            got = os.preadv(self._fd, [target], offset)
            if got != self._chunk_bytes:
                raise self._corrupt(f"chunk {chunk} is cut off")
            return
        stored = bytearray(CRC_BYTES)
        got = os.preadv(self._fd, [target, stored], offset)
        if got != self._chunk_bytes + CRC_BYTES:
            raise self._corrupt(f"chunk {chunk} is cut off")
        if google_crc32c.value(bytes(target)) != int.from_bytes(stored, "little"):
            raise self._corrupt(f"the checksum of chunk {chunk} does not fit its bytes")
        self._checked[chunk] = True

    def _read_index(self, chunks: int) -> NDArray[np.int64]:
        length = os.fstat(self._fd).st_size
        index_bytes = 16 * chunks
        start = length - index_bytes - CRC_BYTES
        tail = os.pread(self._fd, index_bytes + CRC_BYTES, max(start, 0))
        if start < 0 or google_crc32c.value(tail[:-CRC_BYTES]) != int.from_bytes(tail[-CRC_BYTES:], "little"):
            raise self._corrupt("its index is damaged or cut off")
        index = np.frombuffer(tail, "<u8", count=2 * chunks).reshape(chunks, 2)
        present = index[:, 0] != ABSENT
        fits = (index[:, 1] == self._chunk_bytes + CRC_BYTES) & (index[:, 0] + index[:, 1] <= start)
        if not bool(fits[present].all()):
            raise self._corrupt("its index does not fit the layout of the store")
        return np.where(present, index[:, 0], 0).astype(np.int64) - np.where(present, 0, 1)

    def _corrupt(self, what: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"The shard {self.path} is damaged: {what}.",
            str(self.path),
            "The disk or a copy changed bytes after they were written.",
            "Run `fpt extract --check`: it removes damaged shards and computes their images again.",
        )
