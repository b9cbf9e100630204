"""Compute ROC curves, for the report and for `dvc plots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from stages.files import atomic_write
from stages.tables import csv_text, safe_cell
from stages.tasks import Floats, Labels, positives, scored_columns

GRID = np.linspace(0.0, 1.0, 201)
"""False-positive rates at which one-vs-rest curves are averaged."""


@dataclass(frozen=True)
class Roc:
    """ROC curves of one split."""

    classes: dict[str, tuple[Floats, Floats]]
    """Class -> (false-positive rate, true-positive rate), one-vs-rest, for classes with a defined curve."""
    mean: tuple[Floats, Floats] | None
    """Two classes: the curve of the second. More: the mean over classes; None if one is absent."""
    single: bool = False
    """Whether there are two classes, so that the curve of the second suffices."""


def roc_curves(labels: Labels, probabilities: Floats, classes: Sequence[str]) -> Roc:
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
