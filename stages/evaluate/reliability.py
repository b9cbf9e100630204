"""Reliability: the accuracy of predictions as a function of their confidence, and the calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.calibration import calibration_curve

from stages.tasks import Floats, Labels, hits

BINS = 10
"""Number of equal-width bins of confidence."""


@dataclass(frozen=True)
class Reliability:
    """Accuracy as a function of confidence: the highest probability of a row, or the probability of each label."""

    confidence: Floats
    """Mean confidence of each non-empty bin."""
    accuracy: Floats
    """Accuracy of the rows in each bin."""
    rows: npt.NDArray[np.int64]
    """Number of rows in each bin."""

    @property
    def error(self) -> float:
        """Expected calibration error: |accuracy - confidence|, averaged over rows (Naeini et al. 2015)."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.rows))


def reliability(labels: Labels, probabilities: Floats) -> Reliability:
    """Compute the reliability curve over equal-width bins, from labels (n,) and probabilities (n, C).

    With multi-label labels (n, C), each probability is compared with the presence of its label.
    """
    several = labels.ndim == 2
    confidence = np.clip(probabilities.ravel() if several else probabilities.max(axis=1), 0.0, 1.0)
    right = (labels.ravel() if several else hits(labels, probabilities.argmax(axis=1))).astype(np.int64)
    accuracy, mean = calibration_curve(right, confidence, n_bins=BINS, pos_label=1)
    # As in `calibration_curve`, a value on an edge belongs to the lower bin.
    edges = np.linspace(0.0, 1.0, BINS + 1)
    rows = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=BINS)
    return Reliability(mean, accuracy, rows[rows > 0].astype(np.int64))
