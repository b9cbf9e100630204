"""Result of a shift bench: trained methods on corrupted test images and held-out sites, without and with adaptation."""

from __future__ import annotations

from typing import Literal

from schemas.base import Contract
from schemas.sweeps import Spread
from schemas.test_time import Adapt

ShiftName = Literal["brightness", "contrast", "blur", "noise", "jpeg", "downsampling"]
"""Corruptions of images."""

STRENGTHS = (1, 2, 3, 4, 5)
"""Strengths of a corruption, ascending."""

UNCHANGED, SITE = "unchanged", "site"
"""Conditions without a corruption: test images of sites with training images, and those of a held-out site."""

SHIFT_METRICS = ("auc", "accuracy", "balanced_accuracy", "calibration_error", "brier")
"""Metrics of a condition."""


class Condition(Contract):
    """Images on which models are evaluated."""

    shift: str
    """A corruption, "unchanged" or "site"."""
    strength: int = 0
    """From 1 to 5; 0 without a corruption."""
    site: str | None = None
    """Only images of this site; null: test images of all sites that have training images."""

    @property
    def name(self) -> str:
        """For people and file names."""
        if self.site is not None:
            return f"{SITE} {self.site}"
        return f"{self.shift} {self.strength}" if self.strength else self.shift


class ShiftRun(Contract):
    """A trained model on one condition: a file next to the model."""

    key: str
    """Digest of everything that decides the numbers."""
    condition: Condition
    """On what images."""
    adapt: Adapt | None
    """Adaptation; null: none."""
    images: int
    """Evaluated rows."""
    metrics: dict[str, float]
    """Metric -> value; undefined ones are left out."""


class ShiftRow(Contract):
    """A method on one condition, over its runs."""

    shots: str
    """Number of shots, or all."""
    method: str
    """Name in the registry."""
    condition: Condition
    """On what images."""
    adapt: Adapt | None
    """Adaptation; null: none."""
    images: int
    """Evaluated rows."""
    metrics: dict[str, Spread]
    """Metric -> values of the runs."""


class ShiftResult(Contract):
    """`shift.json`."""

    rows: tuple[ShiftRow, ...]
    """Every method, condition and adaptation."""
    seed: int
    """Seed of the noise, of the order of the images and of the search of foa."""
    batch: int
    """Images of a batch of foa and foa-shift."""
    left_out: dict[str, str]
    """Method and adaptation, or site -> why it is not in the table."""
    machine: dict[str, str]
    """Where it ran last."""
    versions: dict[str, str]
    """Versions of Python and packages."""
