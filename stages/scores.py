"""Logits to probabilities by task, and the area under the ROC curve, which chooses the best epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from schemas.tasks import Task
from stages.tasks import positives, scored_columns

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


def probabilities(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """(..., C) logits -> (..., C) probabilities: a softmax over classes, multi-label a sigmoid of each label.

    In double precision.
    """
    wide = logits.double()
    return wide.sigmoid() if task == "multilabel" else wide.softmax(dim=-1)


def log_pool_terms(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """(..., C) logits -> what a logarithmic opinion pool averages; the average is logits again.

    Log-probabilities of the classes; of labels, which are each a yes or no, log p - log(1 - p), the logits themselves.
    """
    return logits if task == "multilabel" else logits.log_softmax(dim=-1)


def auc_per_class(labels: Labels, probabilities: Probabilities) -> list[float | None]:
    """One-vs-rest area under the ROC curve of each class; None for a class that all rows or none of them have."""
    return [_auc(own, p) for own, p in zip(positives(labels, probabilities.shape[1]).T, probabilities.T, strict=True)]


def macro_auc(labels: Labels, probabilities: Probabilities) -> float | None:
    """The AUC that is reported and that chooses the best epoch: binary with two classes, else macro one-vs-rest.

    Args:
        labels: (n,) class indices, or (n, C) zeros and ones: then the mean over labels.
        probabilities: (n, C).

    Returns:
        None where a class is absent, so that two epochs or splits are never compared on different classes.
    """
    per_class = auc_per_class(labels, probabilities)
    return _mean([per_class[index] for index in scored_columns(labels, len(per_class))])


def _auc(positive: npt.NDArray[Any], scores: Probabilities) -> float | None:
    """One-vs-rest AUC; None where only one side occurs."""
    # Imported late: prediction, which shares the functions above, needs no metric.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, scores)) if 0 < positive.sum() < len(positive) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
