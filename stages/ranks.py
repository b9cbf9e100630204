"""Which of several processes this is: what torchrun says in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Without all of these there is one process: other programs set some of them for purposes of their own."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train one model together."""

    rank: int = 0
    """From 0."""
    count: int = 1
    """Of all of them, on all machines."""
    local_rank: int = 0
    """Among those of this machine."""
    local_count: int = 1
    """On this machine."""

    @staticmethod
    def of(environment: Mapping[str, str] | None = None) -> Ranks:
        """As the variables of torchrun say; one process where they are not set.

        Args:
            environment: None: that of this process.
        """
        found = os.environ if environment is None else environment
        if any(name not in found for name in VARIABLES):
            return ALONE
        rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
        return Ranks(rank, count, int(found.get("LOCAL_RANK", rank)), int(found.get("LOCAL_WORLD_SIZE", count)))

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def rows(self, whole: int) -> slice:
        """Of a batch of `whole` rows, those of this process; shares differ by one row at most, and may be empty."""
        return slice(whole * self.rank // self.count, whole * (self.rank + 1) // self.count)


ALONE = Ranks()
"""One process."""
