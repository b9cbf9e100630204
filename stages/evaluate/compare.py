"""Several models on the same rows: metrics of each, and differences to the first with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.errors import EvaluationError
from schemas.results import ComparedModel, Comparison, Difference, EvaluatedModel, Metrics
from schemas.tasks import Task
from stages.evaluate.bootstrap import group_draws, weighted_auc
from stages.evaluate.metrics import check_predictions
from stages.evaluate.predictions import Predictions, read_predictions
from stages.evaluate.scoring import score
from stages.files import read_regular
from stages.tasks import decide, hits, positives, scored_columns
from stages.train.bundle import read_spec

PAIRED: dict[Task, tuple[str, ...]] = {
    "multiclass": ("auc", "accuracy", "balanced_accuracy", "brier"),
    "multilabel": ("auc", "accuracy", "hamming", "balanced_accuracy", "brier"),
    "ordinal": ("quadratic_kappa", "auc", "accuracy", "balanced_accuracy", "brier"),
}
"""Metrics whose differences are given, by their names in `Metrics`."""

Floats = npt.NDArray[np.float64]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare evaluations of the same rows.

    Images of one patient resemble each other, and two models err on the same hard images: whole groups are drawn, and
    both models are scored on the same draws. Such an interval is much narrower than two separate ones suggest.

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
    task = first.task
    probabilities = [check_predictions(labels, table.probabilities, table.classes, task)[1] for table in tables]
    scored = [_scored(table, place) for table, place in zip(tables, places, strict=True)]
    samples = _samples(labels, probabilities, groups, task)
    return Comparison(
        split=first.rows[0].split,
        images=len(labels),
        groups=len(set(groups)),
        unit=first.unit,
        models=tuple(
            ComparedModel(
                name=str(folder),
                model=table.model,
                train_seconds=_train_seconds(place, table.model),
                metrics=metrics,
                differences=_differences(scored[0], metrics, samples[0], sample) if number else {},
            )
            for number, (folder, place, table, metrics, sample) in enumerate(
                zip(folders, places, tables, scored, samples, strict=True)
            )
        ),
    )


def _place(folder: Path) -> Path:
    inner = folder / "evaluation"
    return inner if not (folder / "predictions.parquet").exists() and inner.is_dir() else folder


def _scored(table: Predictions, place: Path) -> Metrics:
    """Metrics of a table, with the warnings of the evaluation that wrote it."""
    metrics = score(table)
    try:
        written = Metrics.model_validate_json(read_regular(place / "metrics.json"))
    except (OSError, ValueError):
        return metrics
    known = written.rows_sha256 == metrics.rows_sha256
    return metrics.model_copy(update={"warnings": written.warnings}) if known else metrics


def _sorted(table: Predictions) -> Predictions:
    """Rows in the order of their paths, so that the order of a manifest does not matter."""
    order = sorted(range(len(table.rows)), key=lambda row: (table.rows[row].path, table.rows[row].id))
    rows = tuple(table.rows[row] for row in order)
    return Predictions(table.classes, rows, table.probabilities[order], table.model, table.task, table.unit)


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
    if expected.task != found.task:
        raise EvaluationError(
            f"{first} and {other} are of other tasks.", f"{expected.task} against {found.task}.", repair
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
    raise EvaluationError(
        f"{first} and {other} were evaluated on different images or labels: they cannot be compared.", cause, repair
    )


def _samples(
    labels: npt.NDArray[np.int64], models: Sequence[Floats], groups: Sequence[str], task: Task
) -> list[dict[str, Floats]]:
    """Of each model: metric -> (r,) values under the same draws of groups, NaN where not defined."""
    parts: list[list[dict[str, Floats]]] = [[] for _ in models]
    for weights in group_draws(groups):
        for part, p in zip(parts, models, strict=True):
            part.append(_weighted(labels, p, weights, task))
    return [
        {name: np.concatenate([chunk[name] for chunk in part] or [np.zeros(0)]) for name in PAIRED[task]}
        for part in parts
    ]


def _weighted(labels: npt.NDArray[np.int64], p: Floats, weights: Floats, task: Task) -> dict[str, Floats]:
    """The paired metrics under weights (n, r) of the rows."""
    there, predicted, total = positives(labels, p.shape[1]), decide(p, task), weights.sum(axis=0)
    guessed, judged = positives(predicted, p.shape[1]), scored_columns(labels, p.shape[1])
    errors = np.sum([(p[:, index] - there[:, index]) ** 2 for index in judged], axis=0)
    found = {
        "auc": np.mean([weighted_auc(there[:, index], p[:, index], weights) for index in judged], axis=0),
        "accuracy": hits(labels, predicted).astype(np.float64) @ weights / total,
        "brier": errors @ weights / total,
    }
    recalls = np.stack([_share(guessed[:, index], there[:, index], weights) for index in range(p.shape[1])])
    if task == "multilabel":
        spared = np.stack([_share(~guessed[:, index], ~there[:, index], weights) for index in range(p.shape[1])])
        found["balanced_accuracy"] = np.mean(
            [_known_mean(pair) for pair in np.stack([recalls, spared], axis=1)], axis=0
        )
        found["hamming"] = (there != guessed).mean(axis=1) @ weights / total
        found["brier"] /= p.shape[1]
        return found
    # A class that no drawn row has is left out, as in `compute_metrics`.
    found["balanced_accuracy"] = _known_mean(recalls)
    if task == "ordinal":
        found["quadratic_kappa"] = _kappa(labels, predicted, weights)
    return found


def _share(right: npt.NDArray[np.bool_], of: npt.NDArray[np.bool_], weights: Floats) -> Floats:
    """(r,): how many of the rows `of` are right; NaN where none was drawn."""
    own = weights[of]
    count, shares = own.sum(axis=0), np.full(weights.shape[1], np.nan)
    np.divide(right[of].astype(np.float64) @ own, count, out=shares, where=count > 0)
    return shares


def _known_mean(values: Floats) -> Floats:
    """(k, r) -> (r,), without what is not defined."""
    known = np.isfinite(values)
    return np.asarray(np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0))


def _kappa(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], weights: Floats) -> Floats:
    """(r,) quadratic kappa; NaN where all rows and predictions are of one grade.

    With squares as costs the chance of two margins y and g is n (E y^2 + E g^2 - 2 E y E g), no matrix is needed.
    """
    y, g, n = labels.astype(np.float64), predicted.astype(np.float64), weights.sum(axis=0)
    observed = (y - g) ** 2 @ weights
    expected = (y**2 + g**2) @ weights - 2 * (y @ weights) * (g @ weights) / n
    values = np.full(len(n), np.nan)
    np.divide(observed, expected, out=values, where=expected > 1e-9)
    return 1.0 - values


def _differences(
    first: Metrics, own: Metrics, first_sample: dict[str, Floats], own_sample: dict[str, Floats]
) -> dict[str, Difference]:
    found = {}
    for name in PAIRED[own.task]:
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


def _train_seconds(place: Path, model: EvaluatedModel | None) -> float | None:
    """Time of the training, if its folder lies beside the evaluation and is of the judged model."""
    try:
        spec = read_spec(place.parent / "model")
        seconds = float(json.loads(read_regular(place.parent / "train" / "metrics.json"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return seconds if model is not None and spec.weights_sha256 == model.weights_sha256 else None
