"""Rank of this process among several, from the environment variables of torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Unless all of these are set there is a single process: other programs set some of them for their own purposes."""


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among the processes that train one model together."""

    rank: int = 0
    """Rank among all processes, from 0."""
    count: int = 1
    """Number of processes on all machines."""
    local_rank: int = 0
    """Rank among the processes of this machine, from 0."""
    local_count: int = 1
    """Number of processes on this machine."""

    @staticmethod
    def of(environment: Mapping[str, str] | None = None) -> Ranks:
        """Read the ranks from the variables of torchrun; without them there is a single process.

        Args:
            environment: Variables; by default those of this process.
        """
        variables = os.environ if environment is None else environment
        if any(name not in variables for name in VARIABLES):
            return ALONE
        rank, count = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        local_rank = int(variables.get("LOCAL_RANK", rank))
        return Ranks(rank, count, local_rank, int(variables.get("LOCAL_WORLD_SIZE", count)))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only process that writes files and logs."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """Return the slice of a global batch for this process; sizes differ by at most one row and may be zero."""
        return slice(batch_size * self.rank // self.count, batch_size * (self.rank + 1) // self.count)


ALONE = Ranks()
"""A single process."""
