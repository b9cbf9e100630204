"""Compute the metrics of a table of predictions, with a digest of its rows and warnings about their validity."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.base import digest
from schemas.manifest import Manifest, ManifestRow, Split
from schemas.results import BundleSpec, Metrics
from schemas.text import counted
from stages.evaluate.metrics import check_predictions, compute_metrics
from stages.evaluate.predictions import Predictions
from stages.fitted_images import count_fitted
from stages.manifest import fitted_sha256

TRAINED_ON = "the model was trained on these images; this is not a test result."
CHANGED = (
    "the training or validation images changed after the model was trained, so it may have been trained on some of "
    "these. Run `fpt train` again."
)
CHOSEN_ON = "validation images were used to choose the epoch and the settings; this is not a test result."


def score(predictions: Predictions, warnings: Sequence[str] = ()) -> Metrics:
    """Compute all metrics of a table of predictions.

    Args:
        predictions: Predictions for the rows of one split.
        warnings: Reasons to distrust the metrics, recorded with them.

    Raises:
        EvaluationError: There are no rows, or a probability is not finite.
    """
    labels, p = check_predictions(predictions.labels, predictions.probabilities, predictions.classes, predictions.task)
    metrics = compute_metrics(
        labels,
        p,
        predictions.classes,
        groups=[row.group for row in predictions.rows],
        split=predictions.rows[0].split,
        task=predictions.task,
    )
    recorded = {"rows_sha256": rows_sha256(predictions.rows), "warnings": tuple(warnings), "unit": predictions.unit}
    return metrics.model_copy(update=recorded)


def rows_sha256(rows: Sequence[ManifestRow]) -> str:
    """Return a digest of the sorted content ids and labels, equal for metrics of the same images and labels."""
    return digest(sorted([row.id, row.label] for row in rows))


def split_warnings(spec: BundleSpec, split: Split, manifest: Manifest) -> tuple[str, ...]:
    """Return why metrics of a split are not a test result; empty if the training did not use its images."""
    if split in spec.fitted_splits:
        return (TRAINED_ON,)
    rows = {row.id for row in manifest.of(split)} if spec.start is not None else set()
    carried = 0 if spec.start is None or split == "val" else count_fitted(spec.start.fitted_images, rows)
    changed = spec.fitted_sha256 is not None and spec.fitted_sha256 != fitted_sha256(manifest)
    earlier = (carried_over(carried, len(rows)),) * (carried > 0)
    return earlier + (CHANGED,) * changed + (CHOSEN_ON,) * (split == "val")


def carried_over(count: int, rows: int) -> str:
    """Return the warning that images trained the model from which training started."""
    return (
        f"{count} of {counted(rows, 'image')} trained the model that training started from, or chose its epoch; this "
        "is not a test result."
    )
