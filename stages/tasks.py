"""Labels and predictions as arrays, the same way in training, evaluation and prediction.

Labels (n,) are class indices; labels (n, C) of zeros and ones are those of a multi-label study. Predictions have the
form of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.tasks import Task, names_in, written

THRESHOLD = 0.5
"""Probability from which a label of a multi-label study is predicted."""

LEAST = 1e-12
"""A probability below this counts as this: its logarithm would outweigh every other model."""

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def label_array(labels: Sequence[str], classes: Sequence[str], task: Task) -> Labels:
    """Labels as a manifest writes them -> (n,) class indices, multi-label (n, C) zeros and ones."""
    index = {name: position for position, name in enumerate(classes)}
    if task != "multilabel":
        return np.asarray([index[label] for label in labels], dtype=np.int64)
    found = np.zeros((len(labels), len(classes)), dtype=np.int64)
    for row, label in zip(found, labels, strict=True):
        row[[index[name] for name in names_in(label, task)]] = 1
    return found


def positives(labels: npt.NDArray[Any], classes: int) -> npt.NDArray[np.bool_]:
    """(n,) or (n, C) labels -> (n, C): which rows are of which class, or have which label."""
    found: npt.NDArray[np.bool_] = labels.astype(bool) if labels.ndim == 2 else labels[:, None] == np.arange(classes)
    return found


def judged_columns(labels: npt.NDArray[Any], classes: int) -> Sequence[int]:
    """Columns of the probabilities that averages are taken over: of two classes the second says it all."""
    return [1] if labels.ndim == 1 and classes == 2 else range(classes)


def decide(probabilities: npt.NDArray[Any], task: Task) -> Labels:
    """The prediction of least expected cost.

    Multiclass: the most probable class, the first of equals. Ordinal: the grade j with the least expected quadratic
    cost sum_k p_k (k - j)^2, which is the expected grade, rounded (the lower one from exactly between two).
    Multi-label: each label of a probability of at least 0.5.

    Args:
        probabilities: (n, C).
        task: What they mean.

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
    # Rounding errors of the sum must not tell apart what is exactly between two grades.
    return np.asarray(np.clip(np.ceil(mean.round(6) - 0.5), 0, p.shape[1] - 1), dtype=np.int64)


def hits(labels: Labels, predicted: Labels) -> npt.NDArray[np.bool_]:
    """(n,): which predictions are right, with several labels all of them."""
    right = labels == predicted
    return np.asarray(right.all(axis=1) if right.ndim == 2 else right)


def texts(predicted: Labels, classes: Sequence[str]) -> list[str]:
    """(n,) or (n, C) -> as a manifest writes it."""
    if predicted.ndim == 1:
        return [classes[index] for index in predicted]
    return [written(name for name, there in zip(classes, row, strict=True) if there) for row in predicted]


def pool(models: Sequence[npt.NDArray[Any]], task: Task) -> Floats:
    """The logarithmic opinion pool of several models' probabilities (n, C): the mean of their log-odds.

    Multiclass and ordinal: softmax of the mean log-probability. Multi-label: of each label by itself.
    """
    if task == "multilabel":
        wide = [np.asarray(one, dtype=np.float64) for one in models]
        odds = [np.log(np.maximum(one, LEAST)) - np.log(np.maximum(1.0 - one, LEAST)) for one in wide]
        return np.asarray(1.0 / (1.0 + np.exp(-np.mean(odds, axis=0))))
    mean = np.mean([np.log(np.maximum(one, LEAST)) for one in models], axis=0)
    shares = np.exp(mean - mean.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
