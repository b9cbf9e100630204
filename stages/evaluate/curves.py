"""Compute ROC and reliability curves, for the report and for `dvc plots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from stages.evaluate.metrics import CALIBRATION_BINS, Labels, Probabilities
from stages.files import atomic_write
from stages.tables import csv_text, safe_cell
from stages.tasks import hits, positives, scored_columns

GRID = np.linspace(0.0, 1.0, 201)
"""False-positive rates at which one-vs-rest curves are averaged."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Roc:
    """ROC curves of one split."""

    classes: dict[str, tuple[Floats, Floats]]
    """Class -> (false-positive rate, true-positive rate), one-vs-rest, for classes with a defined curve."""
    mean: tuple[Floats, Floats] | None
    """Two classes: the curve of the second. More: the mean over classes; None if one is absent."""
    single: bool = False
    """Whether there are two classes, so that the curve of the second suffices."""


def roc_curves(labels: Labels, probabilities: Probabilities, classes: Sequence[str]) -> Roc:
    """Compute ROC curves from labels (n,) or (n, C) and probabilities (n, C)."""
    curves: dict[str, tuple[Floats, Floats]] = {}
    for index, (name, positive) in enumerate(zip(classes, positives(labels, len(classes)).T, strict=True)):
        if 0 < positive.sum() < len(positive):
            fpr, tpr, _ = roc_curve(positive, probabilities[:, index])
            curves[name] = (np.asarray(fpr, dtype=np.float64), np.asarray(tpr, dtype=np.float64))
    if len(curves) < len(classes):
        return Roc(curves, None)
    if len(scored_columns(labels, len(classes))) == 1:
        return Roc(curves, curves[classes[1]], single=True)
    mean = np.mean([np.interp(GRID, fpr, tpr) for fpr, tpr in curves.values()], axis=0)
    # Start at the origin, so that the curve includes the step at a false-positive rate of zero.
    return Roc(curves, (np.r_[0.0, GRID], np.r_[0.0, mean]))


@dataclass(frozen=True)
class Reliability:
    """Accuracy as a function of confidence: the highest probability of a row, or the probability of each label."""

    confidence: Floats
    """Mean confidence of each non-empty bin."""
    accuracy: Floats
    """Accuracy of the rows in each bin."""
    rows: npt.NDArray[np.int64]
    """Number of rows in each bin."""


def reliability(labels: Labels, probabilities: Probabilities) -> Reliability:
    """Compute the reliability curve over equal-width bins, from labels (n,) and probabilities (n, C).

    With multi-label labels (n, C), each probability is compared with the presence of its label.
    """
    several = labels.ndim == 2
    confidence = np.clip(probabilities.ravel() if several else probabilities.max(axis=1), 0.0, 1.0)
    right = (labels.ravel() if several else hits(labels, probabilities.argmax(axis=1))).astype(np.int64)
    accuracy, mean = calibration_curve(right, confidence, n_bins=CALIBRATION_BINS, pos_label=1)
    # As in `calibration_curve`, a value on an edge belongs to the lower bin.
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)
    rows = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=CALIBRATION_BINS)
    return Reliability(mean, accuracy, rows[rows > 0].astype(np.int64))


def write_plots(labels: Labels, predicted: Labels, roc: Roc, classes: Sequence[str], folder: Path) -> None:
    """Write the data of `dvc plots`: `confusion.csv` (actual, predicted; class names as `safe_cell`) and `roc.csv`.

    `roc.csv` (fpr, tpr) has one curve for any number of classes, so that curves of experiments can be overlaid; if a
    class is absent, it has only the header. In a multi-label study, `confusion.csv` has a row per image and label.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [(f"not {name}", safe_cell(name)) for name in classes]
    if labels.ndim == 2:
        pairs = [(names[c][labels[row, c]], names[c][predicted[row, c]]) for row, c in np.ndindex(*labels.shape)]
    else:
        pairs = [(names[label][1], names[guess][1]) for label, guess in zip(labels, predicted, strict=True)]
    atomic_write(folder / "confusion.csv", csv_text([("actual", "predicted"), *pairs]).encode())
    points = [] if roc.mean is None else [(f"{x:.6g}", f"{y:.6g}") for x, y in zip(*roc.mean, strict=True)]
    atomic_write(folder / "roc.csv", csv_text([("fpr", "tpr"), *points]).encode())
