"""Convert labels and predictions to arrays and back; shared by training, evaluation and prediction.

Labels are class indices (n,), or zeros and ones (n, C) in a multi-label study. Predictions have the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.tasks import Task, names_in, written

THRESHOLD = 0.5
"""Lowest probability at which a label of a multi-label study is predicted."""

LEAST = 1e-12
"""Lower bound of probabilities in an ensemble, where the logarithm of a smaller one would outweigh all other models."""

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def label_array(labels: Sequence[str], classes: Sequence[str], task: Task) -> Labels:
    """Convert the labels of a manifest to class indices (n,), or to zeros and ones (n, C) for multi-label."""
    index = {name: position for position, name in enumerate(classes)}
    if task != "multilabel":
        return np.asarray([index[label] for label in labels], dtype=np.int64)
    indicators = np.zeros((len(labels), len(classes)), dtype=np.int64)
    for row, label in zip(indicators, labels, strict=True):
        row[[index[name] for name in names_in(label, task)]] = 1
    return indicators


def positives(labels: npt.NDArray[Any], classes: int) -> npt.NDArray[np.bool_]:
    """Return (n, C) from labels (n,) or (n, C): whether each row is of each class, or has each label."""
    is_class: npt.NDArray[np.bool_] = labels.astype(bool) if labels.ndim == 2 else labels[:, None] == np.arange(classes)
    return is_class


def scored_columns(labels: npt.NDArray[Any], classes: int) -> Sequence[int]:
    """Return the columns of the probabilities that metrics average over: only the second if there are two classes."""
    return [1] if labels.ndim == 1 and classes == 2 else range(classes)


def decide(probabilities: npt.NDArray[Any], task: Task) -> Labels:
    """Return the predictions with the lowest expected cost.

    Multiclass: the most probable class, the first if several are equal. Ordinal: the grade j with the lowest expected
    quadratic cost sum_k p_k (k - j)^2, which is the rounded expected grade (the lower one if exactly between two).
    Multi-label: every label with a probability of at least 0.5.

    Args:
        probabilities: (n, C).
        task: Task of the study.

    Returns:
        (n,) class indices, multi-label (n, C) zeros and ones.
    """
    p = probabilities.astype(np.float64)
    if task == "multilabel":
        return (p >= THRESHOLD).astype(np.int64)
    if task == "multiclass":
        return np.asarray(probabilities.argmax(axis=1), dtype=np.int64)
    grades = np.arange(p.shape[1])
    mean = p @ grades / p.sum(axis=1)
    # Rounding errors of the sum must not decide a tie between two grades.
    return np.asarray(np.clip(np.ceil(mean.round(6) - 0.5), 0, p.shape[1] - 1), dtype=np.int64)


def hits(labels: Labels, predicted: Labels) -> npt.NDArray[np.bool_]:
    """Return (n,) whether each prediction is correct; for multi-label, whether all its labels are."""
    correct = labels == predicted
    return np.asarray(correct.all(axis=1) if correct.ndim == 2 else correct)


def texts(predicted: Labels, classes: Sequence[str]) -> list[str]:
    """Convert predictions (n,) or (n, C) to labels as in a manifest."""
    if predicted.ndim == 1:
        return [classes[index] for index in predicted]
    return [written(name for name, is_set in zip(classes, row, strict=True) if is_set) for row in predicted]


def pool(models: Sequence[npt.NDArray[Any]], task: Task) -> Floats:
    """Combine the probabilities (n, C) of several models by their geometric mean (logarithmic opinion pool).

    Multiclass and ordinal: softmax of the mean log-probability. Multi-label: sigmoid of the mean log-odds per label.

    Args:
        models: Probabilities (n, C) of each model.
        task: Task of the study.

    Returns:
        (n, C) probabilities.
    """
    if task == "multilabel":
        wide = [np.asarray(p, dtype=np.float64) for p in models]
        odds = [np.log(np.maximum(p, LEAST)) - np.log(np.maximum(1.0 - p, LEAST)) for p in wide]
        return np.asarray(1.0 / (1.0 + np.exp(-np.mean(odds, axis=0))))
    mean = np.mean([np.log(np.maximum(p, LEAST)) for p in models], axis=0)
    shares = np.exp(mean - mean.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
