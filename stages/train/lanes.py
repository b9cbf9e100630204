"""Members side by side on the cores of a CPU: each thread takes some of them, forward and backward.

The operations of a small network are too small to be shared out among cores, one by one; networks that learn from the
same batch are not. They share no parameter, and each draws its dropout from a generator of its own, so that what
they learn does not depend on which thread they are in, but for the rounding of larger or smaller products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


class Lanes:
    """Threads, or the calling one alone."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool, self.count = pool, count

    def map(self, work: Callable[[Sequence[Item]], Sequence[Found]], items: Sequence[Item]) -> list[Found]:
        """Work on all items, some in each lane.

        Args:
            work: From some of the items to one result each.
            items: At least one.

        Returns:
            The results, in the order of the items.

        Raises:
            Exception: Of the first lane that failed.
        """
        count = min(self.count, len(items))
        if self._pool is None or count == 1:
            return list(work(items))
        parts = list(self._pool.map(work, [items[lane::count] for lane in range(count)]))
        return [parts[position % count][position // count] for position in range(len(items))]


ONE = Lanes()
"""The calling thread."""


@contextmanager
def open_lanes(members: int, device: torch.device) -> Iterator[Lanes]:
    """As many lanes as there are torch threads and members; each gets its share of the threads. One on accelerators."""
    threads = torch.get_num_threads()
    count = min(threads, members) if device.type == "cpu" else 1
    if count == 1:
        yield ONE
        return
    with ThreadPoolExecutor(count, thread_name_prefix="lane") as pool:
        # Each thread has a number of its own, which it has to set itself; later ones begin with what was set last.
        together = Barrier(count)

        def begin(share: int) -> None:
            torch.set_num_threads(share)
            together.wait()

        list(pool.map(begin, [threads // count + (lane < threads % count) for lane in range(count)]))
        torch.set_num_threads(threads)
        yield Lanes(pool, count)
