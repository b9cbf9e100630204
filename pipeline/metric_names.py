"""Display names of the metrics in tables."""

from __future__ import annotations

from schemas.tasks import Task

NAMES = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1, macro",
    "cohen_kappa": "Cohen's kappa",
    "quadratic_kappa": "quadratic kappa",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "average_precision": "average precision",
    "f1_micro": "F1, micro",
    "hamming": "Hamming loss",
}
"""Field of `Metrics` -> display name."""

MARKS = ("true negatives", "false positives", "false negatives", "true positives")
"""Columns of `Metrics.confusion` in a multi-label study."""


def metric_name(field: str, task: Task, start: bool = False) -> str:
    """Return the display name of a field of `Metrics`, capitalised if it is at the start of a line."""
    name = "exact match" if task == "multilabel" and field == "accuracy" else NAMES[field]
    return name[0].upper() + name[1:] if start else name
