"""Hold the rows of a study in memory if they fit, so that disk or network is read only once."""

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

AUTO_SHARE = 0.5
"""Share of the free memory that "auto" may take; training itself needs little."""
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Folder, limit, usage and key of the cached files in `memory.stat`, for versions 2 and 1 of Linux control groups."""
FILL_ROWS = 64
"""Rows per read while the memory is filled."""


class RowSource(Protocol):
    """Where a data set reads: a store, rows in memory, or images."""

    @property
    def url(self) -> str | None:
        """Where it is read over a network; None: on this machine."""

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Shape and type of one row of each array."""

    def locate(self, row_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each row (n,)."""

    def read_rows(
        self,
        rows: NDArray[np.int64],
        row_ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Read located rows, in their order."""


class MemoryRows:
    """Some rows of a store, in memory shared with the worker processes of a loader."""

    def __init__(self, store: RowSource, row_ids: Sequence[str], names: Sequence[str]) -> None:
        """Read the rows in the order in which they are stored.

        Args:
            store: Store to read from.
            row_ids: Row ids, each once.
            names: Arrays to read.

        Raises:
            CacheIncompleteError: If the store lacks a row.
            CacheCorruptError: If bytes changed since they were written.
        """
        rows = store.locate(row_ids)
        order = np.argsort(rows)
        self.url = store.url
        self._layouts = {name: store.layouts[name] for name in names}
        self._position = {row_ids[at]: position for position, at in enumerate(order.tolist())}
        self._shared = SharedArrays(
            {name: ((len(row_ids), *layout.shape), layout.dtype) for name, layout in self._layouts.items()}
        )
        for start in range(0, len(row_ids), FILL_ROWS):
            batch = order[start : start + FILL_ROWS]
            buffers = {name: array[start : start + len(batch)] for name, array in self._shared.arrays.items()}
            store.read_rows(rows[batch], [row_ids[at] for at in batch.tolist()], names, buffers)

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Shape and type of one row of each array."""
        return dict(self._layouts)

    def locate(self, row_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each row (n,)."""
        return np.array([self._position[row_id] for row_id in row_ids], np.int64)

    def read_rows(
        self,
        rows: NDArray[np.int64],
        row_ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Read located rows, in their order."""
        arrays = {}
        for name in names:
            target = out[name][: len(row_ids)] if out is not None and name in out else None
            # With mode "raise" numpy would fill a copy of the target first; `locate` stays within bounds.
            arrays[name] = np.take(self._shared.arrays[name], rows, axis=0, out=target, mode="clip")
        return arrays


def plan_memory(
    store: RowSource, row_ids: Sequence[str], names: Iterable[str], settings: StoreSettings, processes: int = 1
) -> StoreMemory:
    """Decide whether the rows of a study are held in memory.

    Args:
        store: Store of the rows.
        row_ids: Rows that training reads.
        names: Arrays that it reads.
        settings: Memory budget.
        processes: Training processes on this machine, each with its own copy.
    """
    layouts = [store.layouts[name] for name in names]
    row_bytes = sum(math.prod(layout.shape) * np.dtype(layout.dtype).itemsize for layout in layouts)
    budget = settings.memory_bytes
    if budget is None:
        budget = int(AUTO_SHARE * available_memory())
    budget //= processes
    needed = row_bytes * len(row_ids)
    return StoreMemory(held=0 < needed <= budget, rows=len(row_ids), needed=needed, budget=budget, remote=store.url)


def available_memory() -> int:
    """Return the bytes that this process can still allocate without swapping or hitting the limit of its container."""
    import psutil

    free = [int(psutil.virtual_memory().available)]
    # Not distributed.system.memory_limit: it returns the limit and not what is left of it, and takes 0.4 s to import.
    for folder, limit, usage, cached in CONTROL_GROUPS:
        with suppress(OSError, ValueError, KeyError):
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # The kernel drops cached files when memory is needed, so they count as free.
            free.append(max(0, left + int(statistics[cached])))
    return min(free)
