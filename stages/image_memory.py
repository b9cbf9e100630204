"""Limit the memory that the threads of this process use for decoding images at the same time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

BUDGET_BYTES = 2**30
"""Estimated bytes of all images being decoded; an image that needs more is decoded while no other one is."""


class MemoryBudget:
    """A semaphore weighted by bytes, first come, first served, so that a large image is never starved."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._used = 0
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes fit, and reserve them within the block. Blocks of one thread must not be nested."""
        # A larger request waits until no other is active.
        size = min(size, self.capacity)
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._used + size <= self.capacity)
                self._used += size
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


BUDGET = MemoryBudget(BUDGET_BYTES)
"""Shared by all threads of this process."""
