"""The curves of an evaluation, as numbers: ROC and reliability, for the report and for `dvc plots`."""

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
    """Class -> (false-positive rate, true-positive rate), one-vs-rest; without classes that have no curve."""
    mean: tuple[Floats, Floats] | None
    """Two classes: the curve of the second. More: the mean true-positive rate over classes; None if one is absent."""
    single: bool = False
    """Whether the curve of the second of two classes says it all."""


def roc_curves(labels: Labels, probabilities: Probabilities, classes: Sequence[str]) -> Roc:
    """ROC curves from labels (n,) or (n, C) and probabilities (n, C)."""
    found: dict[str, tuple[Floats, Floats]] = {}
    for index, (name, positive) in enumerate(zip(classes, positives(labels, len(classes)).T, strict=True)):
        if 0 < positive.sum() < len(positive):
            fpr, tpr, _ = roc_curve(positive, probabilities[:, index])
            found[name] = (np.asarray(fpr, dtype=np.float64), np.asarray(tpr, dtype=np.float64))
    if len(found) < len(classes):
        return Roc(found, None)
    if len(scored_columns(labels, len(classes))) == 1:
        return Roc(found, found[classes[1]], single=True)
    mean = np.mean([np.interp(GRID, fpr, tpr) for fpr, tpr in found.values()], axis=0)
    # The step at a false-positive rate of zero belongs to the curve, so it starts at the origin.
    return Roc(found, (np.r_[0.0, GRID], np.r_[0.0, mean]))


@dataclass(frozen=True)
class Reliability:
    """Confidence against how often it is right: the highest probability of a row, or that of each of its labels."""

    confidence: Floats
    """Mean confidence of each bin that has rows."""
    accuracy: Floats
    """Share of these rows that are right."""
    rows: npt.NDArray[np.int64]
    """How many they are."""


def reliability(labels: Labels, probabilities: Probabilities) -> Reliability:
    """The reliability curve over equal-width bins, from labels (n,) and probabilities (n, C).

    Labels (n, C) of a multi-label study: each probability against whether the label is there.
    """
    several = labels.ndim == 2
    confidence = np.clip(probabilities.ravel() if several else probabilities.max(axis=1), 0.0, 1.0)
    right = (labels.ravel() if several else hits(labels, probabilities.argmax(axis=1))).astype(np.int64)
    accuracy, mean = calibration_curve(right, confidence, n_bins=CALIBRATION_BINS, pos_label=1)
    # The same side of an edge as `calibration_curve`, which puts a value on an edge into the lower bin.
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)
    rows = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=CALIBRATION_BINS)
    return Reliability(mean, accuracy, rows[rows > 0].astype(np.int64))


def write_plots(labels: Labels, predicted: Labels, roc: Roc, classes: Sequence[str], folder: Path) -> None:
    """Write what `dvc plots` draws: `confusion.csv` (actual, predicted; names as `safe_cell`) and `roc.csv` (fpr, tpr).

    `roc.csv` has one curve whatever the classes are, so that experiments can be laid over each other; where there is
    none (a class is absent) it holds the header alone. With several labels an image each of them is a pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [(f"not {name}", safe_cell(name)) for name in classes]
    if labels.ndim == 2:
        pairs = [(words[c][labels[row, c]], words[c][predicted[row, c]]) for row, c in np.ndindex(*labels.shape)]
    else:
        pairs = [(words[label][1], words[guess][1]) for label, guess in zip(labels, predicted, strict=True)]
    atomic_write(folder / "confusion.csv", csv_text([("actual", "predicted"), *pairs]).encode())
    points = [] if roc.mean is None else [(f"{x:.6g}", f"{y:.6g}") for x, y in zip(*roc.mean, strict=True)]
    atomic_write(folder / "roc.csv", csv_text([("fpr", "tpr"), *points]).encode())
