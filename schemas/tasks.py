"""Tasks: one class, several labels or a grade per image, and their notation in manifests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Task = Literal["multiclass", "multilabel", "ordinal"]

SEPARATOR = "|"
"""Separates the labels of an image in manifests and predictions; no label of a multi-label study contains it."""

METRICS: dict[Task, tuple[str, ...]] = {
    "multiclass": (
        "auc",
        "accuracy",
        "balanced_accuracy",
        "f1",
        "cohen_kappa",
        "brier",
        "calibration_error",
    ),
    "multilabel": (
        "auc",
        "average_precision",
        "f1",
        "f1_micro",
        "accuracy",
        "hamming",
        "balanced_accuracy",
        "brier",
        "calibration_error",
    ),
    "ordinal": (
        "quadratic_kappa",
        "auc",
        "accuracy",
        "balanced_accuracy",
        "f1",
        "brier",
        "calibration_error",
    ),
}
"""Displayed fields of `Metrics`, in order of importance."""


def names_in(label: str, task: Task) -> tuple[str, ...]:
    """Split a label of a manifest into class names: exactly one, or any number in a multi-label study."""
    if task != "multilabel":
        return (label,)
    return tuple(label.split(SEPARATOR)) if label else ()


def written(names: Iterable[str]) -> str:
    """Join class names to a label of a manifest, the inverse of `names_in`."""
    return SEPARATOR.join(names)
