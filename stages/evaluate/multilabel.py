"""Metrics of a multi-label study, in which each label is a binary decision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

from schemas.manifest import Split
from schemas.results import Metrics
from stages.evaluate.bootstrap import auc_interval
from stages.evaluate.reliability import reliability
from stages.scores import auc_per_class
from stages.tasks import Floats, Labels, decide


def multilabel_metrics(
    labels: Labels,
    probabilities: Floats,
    classes: Sequence[str],
    units: Sequence[str],
    split: Split,
) -> Metrics:
    """Compute all metrics of one split.

    Args:
        labels: (n, C) zeros and ones.
        probabilities: (n, C).
        classes: The C label names, in the order of the columns.
        units: (n,) patient of each row.
        split: Split of the rows; only recorded.
    """
    per_class = auc_per_class(labels, probabilities)
    predicted = decide(probabilities, "multilabel")
    columns = range(len(classes))
    occurring = [index for index in columns if labels[:, index].any() or predicted[:, index].any()]
    defined = [value for value in per_class if value is not None]
    counts = sk.multilabel_confusion_matrix(labels, predicted).reshape(len(classes), 4)
    errors = [reliability(labels[:, [index]], probabilities[:, [index]]).error for index in columns]
    return Metrics(
        split=split,
        task="multilabel",
        images=len(labels),
        groups=len(set(units)),
        auc=float(np.mean(defined)) if len(defined) == len(classes) else None,
        auc_interval=auc_interval(labels, probabilities, units),
        accuracy=float(sk.accuracy_score(labels, predicted)),
        balanced_accuracy=float(np.mean([_balanced(labels[:, index], predicted[:, index]) for index in columns])),
        f1=float(sk.f1_score(labels, predicted, labels=occurring or None, average="macro", zero_division=0.0)),
        f1_micro=float(sk.f1_score(labels, predicted, average="micro", zero_division=0.0)),
        hamming=float(sk.hamming_loss(labels, predicted)),
        average_precision=average_precision(labels, probabilities),
        brier=float(np.mean((probabilities - labels) ** 2)),
        calibration_error=float(np.mean(errors)),
        auc_per_class=dict(zip(classes, per_class, strict=True)),
        absent_classes=tuple(name for name, auc in zip(classes, per_class, strict=True) if auc is None),
        confusion=tuple(tuple(int(n) for n in row) for row in counts),
    )


def average_precision(labels: Labels, probabilities: Floats) -> float | None:
    """Return the area under the precision-recall curve, averaged over labels; None if a label has no row."""
    if not labels.any(axis=0).all():
        return None
    return float(sk.average_precision_score(labels, probabilities, average="macro"))


def _balanced(actual: Labels, predicted: Labels) -> float:
    """Return the mean of sensitivity and specificity of one label, or the defined one of them."""
    return float(sk.recall_score(actual, predicted, labels=np.unique(actual), average="macro", zero_division=0.0))
