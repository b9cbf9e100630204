"""Compare models on the same rows: metrics of each, and differences to the first with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.errors import EvaluationError
from schemas.results import ComparedModel, Comparison, Difference, EvaluatedModel, Metrics
from schemas.tasks import Task
from stages.evaluate.bootstrap import group_draws, percentile_interval, weighted_auc, weighted_recall
from stages.evaluate.metrics import check_predictions
from stages.evaluate.predictions import TABLE, Predictions, evaluation_folder, read_predictions
from stages.evaluate.scoring import score
from stages.files import read_regular
from stages.tasks import decide, hits, positives, scored_columns
from stages.train.bundle_spec import read_spec

PAIRED: dict[Task, tuple[str, ...]] = {
    "multiclass": ("auc", "accuracy", "balanced_accuracy", "brier"),
    "multilabel": ("auc", "accuracy", "hamming", "balanced_accuracy", "brier"),
    "ordinal": ("quadratic_kappa", "auc", "accuracy", "balanced_accuracy", "brier"),
}
"""Metrics to compare, by their field names in `Metrics`."""

Floats = npt.NDArray[np.float64]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare evaluations of the same rows.

    The intervals come from a paired bootstrap: groups are resampled, because images of one patient are correlated, and
    both models are scored on the same samples, because they tend to err on the same hard images. A paired interval is
    much narrower than the separate intervals of two models suggest.

    Args:
        folders: Output folders of `evaluate`, or their parents if these contain it as `evaluation`; the first is the
            reference.

    Raises:
        EvaluationError: A folder has no predictions, or its rows, labels, groups or classes differ from the first ones.
    """
    evaluations = [evaluation_folder(folder) for folder in folders]
    tables = [_sorted(read_predictions(evaluation / TABLE)) for evaluation in evaluations]
    if not tables:
        raise EvaluationError("No evaluations to compare.", repair="Name output folders of `fpt evaluate`.")
    first = tables[0]
    for folder, table in zip(folders[1:], tables[1:], strict=True):
        _check_same(str(folders[0]), first, str(folder), table)
    groups = [row.group for row in first.rows]
    labels = first.labels
    task = first.task
    probabilities = [check_predictions(labels, table.probabilities, table.classes, task)[1] for table in tables]
    scored = [_scored(table, evaluation) for table, evaluation in zip(tables, evaluations, strict=True)]
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
                train_seconds=_train_seconds(evaluation, table.model),
                metrics=metrics,
                differences=_differences(scored[0], metrics, samples[0], sample) if number else {},
            )
            for number, (folder, evaluation, table, metrics, sample) in enumerate(
                zip(folders, evaluations, tables, scored, samples, strict=True)
            )
        ),
    )


def _scored(table: Predictions, evaluation: Path) -> Metrics:
    """Compute the metrics of a table, with the warnings of the evaluation that wrote it."""
    metrics = score(table)
    try:
        written = Metrics.model_validate_json(read_regular(evaluation / "metrics.json"))
    except (OSError, ValueError):
        return metrics
    same_rows = written.rows_sha256 == metrics.rows_sha256
    return metrics.model_copy(update={"warnings": written.warnings}) if same_rows else metrics


def _sorted(table: Predictions) -> Predictions:
    """Sort the rows by path, so that the order of a manifest does not matter."""
    order = sorted(range(len(table.rows)), key=lambda row: (table.rows[row].path, table.rows[row].id))
    rows = tuple(table.rows[row] for row in order)
    return Predictions(table.classes, rows, table.probabilities[order], table.model, table.task, table.unit)


def _check_same(first: str, expected: Predictions, other: str, actual: Predictions) -> None:
    repair = (
        "Evaluate both on the same split of the same manifest: fpt evaluate --model DIR/model --output DIR/evaluation"
    )
    if expected.classes != actual.classes:
        raise EvaluationError(
            f"{first} and {other} have different classes.",
            f"{', '.join(expected.classes)} against {', '.join(actual.classes)}.",
            repair,
        )
    if expected.task != actual.task:
        raise EvaluationError(
            f"{first} and {other} have different tasks.", f"{expected.task} against {actual.task}.", repair
        )
    if expected.rows == actual.rows:
        return
    ids, other_ids = ({row.id for row in table.rows} for table in (expected, actual))
    splits = [" and ".join(sorted({row.split for row in table.rows})) for table in (expected, actual)]
    if ids == other_ids and splits[0] == splits[1]:
        cause = "The images are the same, but their paths, labels or groups differ."
    else:
        cause = (
            f"{len(expected.rows)} rows of {splits[0]} against {len(actual.rows)} of {splits[1]}; "
            f"{len(ids & other_ids)} images are in both."
        )
    raise EvaluationError(
        f"{first} and {other} were evaluated on different images or labels: they cannot be compared.", cause, repair
    )


def _samples(
    labels: npt.NDArray[np.int64], models: Sequence[Floats], groups: Sequence[str], task: Task
) -> list[dict[str, Floats]]:
    """Return, for each model, metric -> (r,) values on the same bootstrap samples, NaN where undefined."""
    chunks_of: list[list[dict[str, Floats]]] = [[] for _ in models]
    for weights in group_draws(groups):
        for chunks, p in zip(chunks_of, models, strict=True):
            chunks.append(_weighted(labels, p, weights, task))
    return [
        {name: np.concatenate([chunk[name] for chunk in chunks] or [np.zeros(0)]) for name in PAIRED[task]}
        for chunks in chunks_of
    ]


def _weighted(labels: npt.NDArray[np.int64], p: Floats, weights: Floats, task: Task) -> dict[str, Floats]:
    """Compute the paired metrics under weights (n, r) of the rows."""
    positive, predicted, total = positives(labels, p.shape[1]), decide(p, task), weights.sum(axis=0)
    guessed, columns = positives(predicted, p.shape[1]), scored_columns(labels, p.shape[1])
    errors = np.sum([(p[:, index] - positive[:, index]) ** 2 for index in columns], axis=0)
    values = {
        "auc": np.mean([weighted_auc(positive[:, index], p[:, index], weights) for index in columns], axis=0),
        "accuracy": hits(labels, predicted).astype(np.float64) @ weights / total,
        "brier": errors @ weights / total,
    }
    recalls = np.stack([weighted_recall(guessed[:, index], positive[:, index], weights) for index in range(p.shape[1])])
    if task == "multilabel":
        specificities = np.stack(
            [weighted_recall(~guessed[:, index], ~positive[:, index], weights) for index in range(p.shape[1])]
        )
        values["balanced_accuracy"] = np.mean(
            [_defined_mean(pair) for pair in np.stack([recalls, specificities], axis=1)], axis=0
        )
        values["hamming"] = (positive != guessed).mean(axis=1) @ weights / total
        values["brier"] /= p.shape[1]
        return values
    # Classes without a row in the sample are left out, as in `compute_metrics`.
    values["balanced_accuracy"] = _defined_mean(recalls)
    if task == "ordinal":
        values["quadratic_kappa"] = _kappa(labels, predicted, weights)
    return values


def _defined_mean(values: Floats) -> Floats:
    """Average (k, r) to (r,), ignoring undefined values."""
    defined = np.isfinite(values)
    return np.asarray(np.where(defined, values, 0.0).sum(axis=0) / defined.sum(axis=0))


def _kappa(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], weights: Floats) -> Floats:
    """Return the (r,) quadratic kappa; NaN where all rows and predictions have the same grade.

    With squared costs, the expected cost for independent grades y and g is n (E y^2 + E g^2 - 2 E y E g), so that no
    confusion matrix is needed.
    """
    y, g, n = labels.astype(np.float64), predicted.astype(np.float64), weights.sum(axis=0)
    observed = (y - g) ** 2 @ weights
    expected = (y**2 + g**2) @ weights - 2 * (y @ weights) * (g @ weights) / n
    values = np.full(len(n), np.nan)
    np.divide(observed, expected, out=values, where=expected > 1e-9)
    return 1.0 - values


def _differences(
    reference: Metrics, metrics: Metrics, reference_sample: dict[str, Floats], sample: dict[str, Floats]
) -> dict[str, Difference]:
    differences = {}
    for name in PAIRED[metrics.task]:
        reference_value, value = getattr(reference, name), getattr(metrics, name)
        if reference_value is None or value is None:
            continue
        paired = sample[name] - reference_sample[name]
        differences[name] = Difference(value=value - reference_value, interval=percentile_interval(paired))
    return differences


def _train_seconds(evaluation: Path, model: EvaluatedModel | None) -> float | None:
    """Return the training time if the training folder is next to the evaluation and belongs to the same model."""
    try:
        spec = read_spec(evaluation.parent / "model")
        seconds = float(json.loads(read_regular(evaluation.parent / "train" / "metrics.json"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return seconds if model is not None and spec.weights_sha256 == model.weights_sha256 else None
