"""The rows of a study in memory, where they fit: then the disk, or the network, is read once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.cost import StoreMemory
from schemas.machine import StoreSettings
from stages.shared import SharedArrays
from stages.store.layout import ArrayLayout
from stages.store.reader import StoreReader

AUTO_SHARE = 0.5
"""Share of the memory that is free now which "auto" may take; training itself needs little."""
FILL_ROWS = 64
"""Rows read at a time while the memory is filled."""


class Rows(Protocol):
    """Where a data set reads: a store, or a part of one in memory."""

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Shape and type of one row of each array."""

    def locate(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Row of each image."""

    def read_rows(
        self,
        rows: NDArray[np.int64],
        ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of located images, in their order."""


class MemoryRows:
    """Some rows of a store, in memory that a loader's workers share."""

    def __init__(self, store: StoreReader, ids: Sequence[str], names: Sequence[str]) -> None:
        """Read them, in the order in which they lie on the disk.

        Args:
            store: Where they are.
            ids: Images, each once.
            names: Arrays.

        Raises:
            CacheIncompleteError: If an image has no row.
            CacheCorruptError: If bytes changed since they were written.
        """
        rows = store.locate(ids)
        order = np.argsort(rows)
        self._layouts = {name: store.layouts[name] for name in names}
        self._position = {ids[at]: position for position, at in enumerate(order.tolist())}
        self._shared = SharedArrays(
            {name: ((len(ids), *layout.shape), layout.dtype) for name, layout in self._layouts.items()}
        )
        for start in range(0, len(ids), FILL_ROWS):
            some = order[start : start + FILL_ROWS]
            part = {name: array[start : start + len(some)] for name, array in self._shared.arrays.items()}
            store.read_rows(rows[some], [ids[at] for at in some.tolist()], names, part)

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Shape and type of one row of each array."""
        return dict(self._layouts)

    def locate(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Row of each image."""
        return np.array([self._position[image_id] for image_id in ids], np.int64)

    def read_rows(
        self,
        rows: NDArray[np.int64],
        ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of located images, in their order."""
        found = {}
        for name in names:
            target = out[name][: len(ids)] if out is not None and name in out else None
            # With "raise" numpy would fill a copy of the target first; rows of `locate` are within bounds.
            found[name] = np.take(self._shared.arrays[name], rows, axis=0, out=target, mode="clip")
        return found


def plan_memory(
    store: StoreReader, ids: Sequence[str], names: Iterable[str], settings: StoreSettings, processes: int = 1
) -> StoreMemory:
    """Whether the rows of a study fit into the memory that they may take; each process of a machine holds its own."""
    row = sum(
        math.prod(layout.shape) * np.dtype(layout.dtype).itemsize for layout in (store.layouts[name] for name in names)
    )
    budget = settings.memory_bytes
    if budget is None:
        budget = int(AUTO_SHARE * available_memory())
    budget //= processes
    held = 0 < row * len(ids) <= budget
    return StoreMemory(held=held, rows=len(ids), needed=row * len(ids), budget=budget, remote=store.url)


def available_memory() -> int:
    """Bytes that this process may still take without pushing others out; 0 where the system does not say."""
    found = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    # In a container the limit of its control group counts; cached files can be dropped, so they count as free.
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(dict(lines)["inactive_file"])
        found.append(max(0, limit - used + cached))
    return min(found, default=0)
