"""Members side by side on the cores of a CPU: each thread takes some of them, forward and backward.

The operations of a small network are too small to be shared out among cores, one by one; networks that learn from the
same batch are not. They share no parameter, and each draws its dropout from a generator of its own, so that what
they learn does not depend on which thread they are in, but for the rounding of larger or smaller products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


class Threads:
    """Threads, or only the calling one."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool, self.count = pool, count

    def map(self, work: Callable[[Sequence[Item]], Sequence[Found]], items: Sequence[Item]) -> list[Found]:
        """Work on all items, some in each thread.

        Args:
            work: From some of the items to one result each.
            items: At least one.

        Returns:
            The results, in the order of the items.

        Raises:
            Exception: Of the first thread that failed.
        """
        count = min(self.count, len(items))
        if self._pool is None or count == 1:
            return list(work(items))
        parts = list(self._pool.map(work, [items[thread::count] for thread in range(count)]))
        return [parts[position % count][position // count] for position in range(len(items))]


CALLING_THREAD = Threads()
"""The calling thread."""


@contextmanager
def open_threads(members: int, device: torch.device) -> Iterator[Threads]:
    """As many threads as there are torch threads and members, one on accelerators.

    Inside, torch has an equal share of its threads in every thread, and in the calling thread.
    """
    threads = torch.get_num_threads()
    count = min(threads, members) if device.type == "cpu" else 1
    if count == 1:
        yield CALLING_THREAD
        return
    # Before the threads start: where torch keeps a number for each thread, a new one begins with what was set last.
    torch.set_num_threads(threads // count)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="fit") as pool:
            yield Threads(pool, count)
    finally:
        torch.set_num_threads(threads)
