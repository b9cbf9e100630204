"""Compute the metrics of an evaluation with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from schemas.errors import EvaluationError
from schemas.manifest import Split
from schemas.results import Metrics
from schemas.tasks import Task
from stages.evaluate.bootstrap import auc_interval
from stages.evaluate.multilabel import multilabel_metrics
from stages.evaluate.reliability import reliability
from stages.scores import auc_per_class, macro_auc
from stages.tasks import decide

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


def compute_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    classes: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    split: Split = "test",
    task: Task = "multiclass",
) -> Metrics:
    """Compute all metrics of one split.

    Args:
        labels: (n,) index of each row's label in `classes`; multi-label: (n, C) zeros and ones.
        probabilities: (n, C), each in [0, 1].
        classes: The C label names, in the order of the model's outputs.
        groups: (n,) patient of each row, the unit of the bootstrap; None to resample single rows.
        split: Split of the rows; only recorded.
        task: Task of the model.

    Returns:
        The metrics. Undefined ones, such as the AUC of an absent class, are None, never NaN.

    Raises:
        EvaluationError: There are no rows, shapes or labels do not match, or a probability is not in [0, 1].
    """
    y, p = check_predictions(labels, probabilities, classes, task)
    units = [str(row) for row in range(len(y))] if groups is None else list(groups)
    if len(units) != len(y):
        raise EvaluationError(f"{len(y)} rows were given with {len(units)} groups.")
    if task == "multilabel":
        return multilabel_metrics(y, p, classes, units, split)
    predicted = decide(p, task)
    indices = np.arange(len(classes))
    present = np.unique(y)
    return Metrics(
        split=split,
        task=task,
        images=len(y),
        groups=len(set(units)),
        auc=macro_auc(y, p),
        auc_interval=auc_interval(y, p, units),
        accuracy=float(sk.accuracy_score(y, predicted)),
        balanced_accuracy=float(sk.recall_score(y, predicted, labels=present, average="macro")),
        f1=float(sk.f1_score(y, predicted, labels=np.union1d(y, predicted), average="macro", zero_division=0.0)),
        cohen_kappa=_kappa(y, predicted, indices, None) if task == "multiclass" else None,
        quadratic_kappa=_kappa(y, predicted, indices, "quadratic") if task == "ordinal" else None,
        brier=_brier(y, p),
        calibration_error=reliability(y, p).error,
        auc_per_class=dict(zip(classes, auc_per_class(y, p), strict=True)),
        absent_classes=tuple(name for index, name in enumerate(classes) if index not in present),
        confusion=tuple(tuple(int(n) for n in row) for row in sk.confusion_matrix(y, predicted, labels=indices)),
    )


def check_predictions(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, classes: Sequence[str], task: Task = "multiclass"
) -> tuple[Labels, Probabilities]:
    """Check labels, (n,) or multi-label (n, C), and probabilities (n, C), and return them as arrays."""
    y, p = np.asarray(labels, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    if y.size == 0:
        raise EvaluationError("There are no rows to evaluate.")
    if len(classes) < 2:
        raise EvaluationError(f"Metrics need at least two classes, these rows have {len(classes)}.")
    shape = (len(y), len(classes)) if task == "multilabel" else (len(y),)
    if y.shape != shape or p.shape != (len(y), len(classes)):
        raise EvaluationError(
            f"Labels of shape {y.shape} and probabilities of shape {p.shape} do not fit {len(classes)} classes."
        )
    if y.min() < 0 or y.max() >= (2 if task == "multilabel" else len(classes)):
        raise EvaluationError(f"A label is not one of the {len(classes)} classes.")
    invalid = np.flatnonzero(~np.isfinite(p).all(axis=1))
    if invalid.size:
        raise EvaluationError(
            f"{invalid.size} of {len(y)} rows have probabilities that are not finite, the first is row {invalid[0]}.",
            "The weights of the model are damaged, or training diverged.",
            "Train again with a lower learning rate: fpt train --set train.lr=1e-4",
        )
    # Probabilities computed in float32 may exceed one by a rounding error.
    if p.min() < -1e-5 or p.max() > 1 + 1e-5:
        raise EvaluationError("A probability is not between 0 and 1.", "Logits may have been passed instead.")
    return y, np.clip(p, 0.0, 1.0)


def _kappa(
    y: Labels, predicted: npt.NDArray[Any], indices: npt.NDArray[Any], weights: Literal["quadratic"] | None
) -> float | None:
    """Return Cohen's kappa; None if all labels and predictions are the same class (0 / 0)."""
    if len(np.union1d(y, predicted)) < 2:
        return None
    return float(sk.cohen_kappa_score(y, predicted, labels=indices, weights=weights))


def _brier(y: Labels, p: Probabilities) -> float:
    """Return the Brier score: of the second of two classes, or summed over three or more."""
    columns = [1] if p.shape[1] == 2 else range(p.shape[1])
    return float(sum(sk.brier_score_loss(y == index, p[:, index], pos_label=True) for index in columns))
