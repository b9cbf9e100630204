"""Phases of a training: epochs with an optimiser state and a learning-rate schedule of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs of a training. The epoch that is kept is one of the last phase."""

    first: int
    """First epoch, from 1; it starts without optimiser state."""
    last: int
    """Last epoch, at the end of which the learning rate is 0."""
    rate: float = 1.0
    """Factor of `train.lr`; 0: nothing moves."""

    def progress(self, epoch: int, step: int, steps: int) -> float:
        """Return the finished share of the phase, in [0, 1).

        Args:
            epoch: From 1, in the phase.
            step: Finished steps of the epoch.
            steps: Steps of an epoch.
        """
        return ((epoch - self.first) * steps + step) / ((self.last - self.first + 1) * steps)
