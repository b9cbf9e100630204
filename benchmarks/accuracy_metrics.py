"""Metrics of `accuracy.py` for many weightings of the same images, as a bootstrap needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import log_loss

from stages.evaluate.bootstrap import weighted_auc, weighted_recall
from stages.evaluate.metrics import compute_metrics
from stages.evaluate.reliability import BINS
from stages.tasks import positives, scored_columns

OTHERS = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "log_loss": "log loss", "ece": "ECE"}
"""Metrics over all images of a repeat -> name in tables."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tested:
    """Predictions of a recipe for the test images of one fold, averaged over seeds."""

    classes: tuple[str, ...]
    """Class names."""
    rows: tuple[str, ...]
    """Paths of the n images."""
    labels: npt.NDArray[np.int64]
    """(n,) class indices."""
    patients: tuple[str, ...]
    """Patient of each image."""
    probabilities: Floats
    """(n, classes)."""
    repeat: int = 0
    """Number of the cross-validation."""

    def auc(self, weights: Floats) -> Floats:
        """Return the macro one-vs-rest AUC (r,) for weights (n, r) of the images, NaN without an image of a class."""
        classes = len(self.classes)
        positive = positives(self.labels, classes)
        columns = scored_columns(self.labels, classes)
        values = [weighted_auc(positive[:, at], self.probabilities[:, at], weights) for at in columns]
        return np.asarray(np.mean(values, axis=0))


def mean_auc(folds: Sequence[Tested], weights: Sequence[Floats]) -> Floats:
    """Return the mean AUC (r,) of some folds for weights (n, r) of the images of each.

    Folds without a weighted image of some class are left out of the mean.
    """
    aucs = [fold.auc(one) for fold, one in zip(folds, weights, strict=True)]
    return np.asarray(np.ma.masked_invalid(aucs).mean(axis=0).filled(np.nan))


def by_repeat(folds: Sequence[Tested]) -> list[list[int]]:
    """Return the positions of the folds of each repeat."""
    numbers = sorted({fold.repeat for fold in folds})
    return [[at for at, fold in enumerate(folds) if fold.repeat == number] for number in numbers]


def joined(folds: Sequence[Tested]) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return labels (n,) and probabilities (n, classes) of the images of some folds."""
    return np.concatenate([fold.labels for fold in folds]), np.concatenate([fold.probabilities for fold in folds])


def library_metrics(folds: Sequence[Tested]) -> dict[str, float]:
    """Return the other metrics over all images of a repeat, averaged over repeats, by the libraries."""
    repeats = []
    for members in by_repeat(folds):
        labels, p = joined([folds[at] for at in members])
        metrics = compute_metrics(labels, p, folds[0].classes)
        loss = float(log_loss(labels, p, labels=range(p.shape[1])))
        repeats.append((metrics.accuracy, metrics.balanced_accuracy, loss, metrics.calibration_error))
    return dict(zip(OTHERS, np.mean(repeats, axis=0).tolist(), strict=True))


def other_metrics(folds: Sequence[Tested], weights: Sequence[Floats]) -> dict[str, Floats]:
    """Return the other metrics (r,) over all images of a repeat, averaged over repeats; weights as for `mean_auc`."""
    repeats = []
    for members in by_repeat(folds):
        labels, p = joined([folds[at] for at in members])
        repeats.append(_metrics(labels, p, np.concatenate([weights[at] for at in members])))
    return {name: np.asarray(np.mean([one[name] for one in repeats], axis=0)) for name in OTHERS}


def _metrics(labels: npt.NDArray[np.int64], p: Floats, weights: Floats) -> dict[str, Floats]:
    """Return the metrics (r,) of n images for weights (n, r); defined as in `library_metrics`."""
    predicted = p.argmax(axis=1)
    right = predicted == labels
    of_label = np.clip(p[np.arange(len(labels)), labels], np.finfo(p.dtype).eps, 1.0)
    confidence, total = p.max(axis=1), weights.sum(axis=0)
    recalls = [weighted_recall(predicted == at, labels == at, weights) for at in range(p.shape[1])]
    bins = np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:-1], confidence)
    errors = [np.abs((right - confidence)[bins == one] @ weights[bins == one]) for one in np.unique(bins)]
    return {
        "accuracy": right @ weights / total,
        "balanced_accuracy": np.asarray(np.mean(recalls, axis=0)),
        "log_loss": -np.log(of_label) @ weights / total,
        "ece": np.sum(errors, axis=0) / total,
    }
