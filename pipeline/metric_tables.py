"""Tables of the metrics of one evaluation, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.console import score, show, show_pairs, show_table
from pipeline.metric_names import MARKS, metric_name
from schemas.tasks import METRICS
from schemas.text import images_of

if TYPE_CHECKING:
    from schemas.results import Metrics


def show_metrics(metrics: Metrics) -> None:
    """Print warnings, metrics and the confusion matrix."""
    for warning in metrics.warnings:
        show(f"Warning: {warning}")
    intervals = {}
    if metrics.auc_interval is not None:
        intervals["auc"] = f"  (95%: {metrics.auc_interval[0]:.3f} to {metrics.auc_interval[1]:.3f})"
    show_pairs(
        f"{metrics.split}: {images_of(metrics.images, metrics.groups, metrics.unit)}",
        [
            (metric_name(field, metrics.task, start=True), score(getattr(metrics, field)) + intervals.get(field, ""))
            for field in METRICS[metrics.task]
        ],
    )
    classes = [f'"{name}"' for name in metrics.auc_per_class]
    rows = [
        [name, *(str(count) for count in counts), score(auc)]
        for name, counts, auc in zip(classes, metrics.confusion, metrics.auc_per_class.values(), strict=True)
    ]
    if metrics.task == "multilabel":
        show_table("Images by label, at a probability of 0.5", ["label", *MARKS, "AUC"], rows)
    else:
        show_table("Labels (rows) and predictions (columns)", ["label", *classes, "AUC"], rows)
