"""Memory shared between processes, without /dev/shm, which is small in many containers."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedArrays:
    """Named arrays in one block of shared memory.

    A child process (fork, forkserver or spawn) sees the same bytes. `/dev/shm` has 64 MB in many containers, so the
    memory is an anonymous file (`memfd_create`), or an unlinked temporary file on systems without it.
    """

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], str]]) -> None:
        """Allocate the memory.

        Args:
            shapes: Name -> (shape, numpy type).
        """
        self._shapes = shapes
        # Arrays start at page boundaries, because reads from disk into aligned memory are slightly faster.
        self._size = max(1, sum(_padded(*shape) for shape in shapes.values()))
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("fpt")
        else:
            self._fd, path = tempfile.mkstemp()
            os.unlink(path)  # noqa: PTH108
        os.ftruncate(self._fd, self._size)
        self._map()

    def _map(self) -> None:
        self._memory = mmap.mmap(self._fd, self._size)
        self.arrays: dict[str, NDArray[Any]] = {}
        start = 0
        for name, (shape, dtype) in self._shapes.items():
            self.arrays[name] = np.frombuffer(self._memory, dtype, math.prod(shape), start).reshape(shape)
            start += _padded(shape, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"_shapes": self._shapes, "_size": self._size, "_handle": reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shapes, self._size, self._fd = state["_shapes"], state["_size"], state["_handle"].detach()
        self._map()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1


def _padded(shape: tuple[int, ...], dtype: str) -> int:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
