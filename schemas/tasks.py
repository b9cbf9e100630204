"""What is learnt of an image: one class, several labels, or a grade; and how a manifest writes it down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Task = Literal["multiclass", "multilabel", "ordinal"]

SEPARATOR = "|"
"""Between the labels of an image in manifests and predictions; no label of a multi-label study contains it."""

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
"""Fields of `Metrics` that are shown, the one that counts most first."""


def names_in(label: str, task: Task) -> tuple[str, ...]:
    """The class names that a written label stands for: one, or with several labels an image any number."""
    if task != "multilabel":
        return (label,)
    return tuple(label.split(SEPARATOR)) if label else ()


def written(names: Iterable[str]) -> str:
    """The opposite of `names_in`."""
    return SEPARATOR.join(names)
