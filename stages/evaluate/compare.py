"""Several models on the same rows: metrics of each, and differences to the first with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.errors import EvaluationError
from schemas.results import BundleSpec, ComparedModel, Comparison, Difference, JudgedModel, Metrics
from stages.evaluate.bootstrap import group_draws, weighted_auc
from stages.evaluate.metrics import check_predictions, compute_metrics
from stages.evaluate.predictions import Predictions, read_predictions
from stages.train.bundle import SPEC

PAIRED = ("auc", "accuracy", "balanced_accuracy", "brier")
"""Metrics whose differences are given, by their names in `Metrics`."""

Floats = npt.NDArray[np.float64]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare evaluations of the same rows.

    Images of one patient resemble each other, and two models err on the same hard images: whole groups are drawn, and
    both models are judged on the same draws. Such an interval is much narrower than two separate ones suggest.

    Args:
        folders: Each from `evaluate`, or with a folder `evaluation` from it inside; the first is the reference.

    Raises:
        EvaluationError: There are no predictions in a folder, or they are of other rows, labels, groups or classes than
            the first ones.
    """
    places = [_place(folder) for folder in folders]
    tables = [_sorted(read_predictions(place / "predictions.parquet")) for place in places]
    if not tables:
        raise EvaluationError("There is nothing to compare.", repair="Name folders that `fpt evaluate` wrote.")
    first = tables[0]
    for folder, table in zip(folders[1:], tables[1:], strict=True):
        _check_same(str(folders[0]), first, str(folder), table)
    groups = [row.group for row in first.rows]
    labels = first.labels
    probabilities = [check_predictions(labels, table.probabilities, table.classes)[1] for table in tables]
    judged = [
        compute_metrics(labels, p, first.classes, groups=groups, split=first.rows[0].split) for p in probabilities
    ]
    samples = _samples(labels, probabilities, groups)
    return Comparison(
        split=first.rows[0].split,
        images=len(labels),
        groups=len(set(groups)),
        models=tuple(
            ComparedModel(
                name=str(folder),
                model=table.model,
                train_seconds=_train_seconds(place, table.model),
                metrics=metrics,
                differences=_differences(judged[0], metrics, samples[0], sample) if number else {},
            )
            for number, (folder, place, table, metrics, sample) in enumerate(
                zip(folders, places, tables, judged, samples, strict=True)
            )
        ),
    )


def _place(folder: Path) -> Path:
    inner = folder / "evaluation"
    return inner if not (folder / "predictions.parquet").exists() and inner.is_dir() else folder


def _sorted(table: Predictions) -> Predictions:
    """Rows in the order of their paths, so that the order of a manifest does not matter."""
    order = sorted(range(len(table.rows)), key=lambda row: (table.rows[row].path, table.rows[row].id))
    return Predictions(table.classes, tuple(table.rows[row] for row in order), table.probabilities[order], table.model)


def _check_same(first: str, expected: Predictions, other: str, found: Predictions) -> None:
    repair = (
        "Evaluate both on the same split of the same manifest: fpt evaluate --model DIR/model --output DIR/evaluation"
    )
    if expected.classes != found.classes:
        raise EvaluationError(
            f"{first} and {other} have other classes.",
            f"{', '.join(expected.classes)} against {', '.join(found.classes)}.",
            repair,
        )
    if expected.rows == found.rows:
        return
    mine, theirs = ({row.id for row in table.rows} for table in (expected, found))
    splits = [" and ".join(sorted({row.split for row in table.rows})) for table in (expected, found)]
    if mine == theirs and splits[0] == splits[1]:
        cause = "The images are the same, but not their paths, labels or groups."
    else:
        cause = (
            f"{len(expected.rows)} rows of {splits[0]} against {len(found.rows)} of {splits[1]}; "
            f"{len(mine & theirs)} images are in both."
        )
    raise EvaluationError(f"{first} and {other} are of other rows: they cannot be compared.", cause, repair)


def _samples(labels: npt.NDArray[np.int64], models: Sequence[Floats], groups: Sequence[str]) -> list[dict[str, Floats]]:
    """Of each model: metric -> (r,) values under the same draws of groups, NaN where not defined."""
    parts: list[list[dict[str, Floats]]] = [[] for _ in models]
    for weights in group_draws(groups):
        for part, p in zip(parts, models, strict=True):
            part.append(_weighted(labels, p, weights))
    return [
        {name: np.concatenate([chunk[name] for chunk in part] or [np.zeros(0)]) for name in PAIRED} for part in parts
    ]


def _weighted(labels: npt.NDArray[np.int64], p: Floats, weights: Floats) -> dict[str, Floats]:
    """The paired metrics under weights (n, r) of the rows."""
    classes = p.shape[1]
    judged = [1] if classes == 2 else list(range(classes))
    right, total = (p.argmax(axis=1) == labels).astype(np.float64), weights.sum(axis=0)
    recalls = np.full((classes, weights.shape[1]), np.nan)
    for index in range(classes):
        own = weights[labels == index]
        count = own.sum(axis=0)
        np.divide(right[labels == index] @ own, count, out=recalls[index], where=count > 0)
    # A class that no drawn row has is left out, as in `compute_metrics`.
    present = np.isfinite(recalls)
    errors = sum((p[:, index] - (labels == index)) ** 2 for index in judged)
    return {
        "auc": np.mean([weighted_auc(labels == index, p[:, index], weights) for index in judged], axis=0),
        "accuracy": right @ weights / total,
        "balanced_accuracy": np.where(present, recalls, 0.0).sum(axis=0) / present.sum(axis=0),
        "brier": np.asarray(errors) @ weights / total,
    }


def _differences(
    first: Metrics, own: Metrics, first_sample: dict[str, Floats], own_sample: dict[str, Floats]
) -> dict[str, Difference]:
    found = {}
    for name in PAIRED:
        before, value = getattr(first, name), getattr(own, name)
        if before is None or value is None:
            continue
        paired = own_sample[name] - first_sample[name]
        finite = paired[np.isfinite(paired)]
        interval = None
        if len(finite) and len(finite) >= len(paired) / 2:
            low, high = np.percentile(finite, [2.5, 97.5])
            interval = (float(low), float(high))
        found[name] = Difference(value=value - before, interval=interval)
    return found


def _train_seconds(place: Path, model: JudgedModel | None) -> float | None:
    """Time of the training, if its folder lies beside the evaluation and is of the judged model."""
    try:
        spec = BundleSpec.model_validate_json((place.parent / "model" / SPEC).read_bytes())
        seconds = json.loads((place.parent / "train" / "metrics.json").read_text())["seconds"]
    except (OSError, ValueError, KeyError):
        return None
    return float(seconds) if model is not None and spec.weights_sha256 == model.weights_sha256 else None
