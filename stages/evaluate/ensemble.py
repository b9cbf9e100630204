"""Score ensembles of evaluated models, which average log-probabilities (a logarithmic opinion pool)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas.base import digest
from schemas.errors import EvaluationError
from schemas.results import EvaluatedModel, Metrics
from stages.evaluate.predictions import TABLE, Predictions, read_predictions, write_predictions
from stages.evaluate.scoring import score
from stages.files import atomic_write
from stages.tasks import pool


def score_ensemble(folders: Sequence[Path]) -> Metrics:
    """Compute the metrics of an ensemble of models that were evaluated on the same rows.

    Args:
        folders: Output folders of `evaluate`.

    Raises:
        EvaluationError: There are no folders, or their rows or classes differ.
    """
    return score(_average(folders))


def score_pooled(folds: Sequence[Sequence[Path]], output: Path | None = None) -> Metrics:
    """Compute the metrics of an ensemble per fold, pooled over folds.

    Args:
        folds: For each fold, the output folders of `evaluate` for the models of its ensemble. No row is in two folds.
        output: Folder for `predictions.parquet` and `metrics.json`, which `compare` reads, or None to write nothing.

    Raises:
        EvaluationError: Evaluations of one fold differ in rows or classes, or a row is in two folds.
        StorageError: The output cannot be written.
    """
    table = _join([_average(folders) for folders in folds])
    metrics = score(table)
    if output is not None:
        write_predictions(table, output / TABLE)
        atomic_write(output / "metrics.json", (metrics.model_dump_json(indent=1) + "\n").encode())
    return metrics


def _average(folders: Sequence[Path]) -> Predictions:
    tables = [read_predictions(folder / TABLE) for folder in folders]
    if not tables:
        raise EvaluationError("No evaluations to average.", repair="Name output folders of `fpt evaluate`.")
    first = tables[0]
    for folder, table in zip(folders, tables, strict=True):
        if (table.rows, table.classes, table.task) != (first.rows, first.classes, first.task):
            raise EvaluationError(
                f"The rows, classes or tasks of {folder} and {folders[0]} differ.",
                "They are evaluations of different splits or studies.",
                "Repeat both with `fpt evaluate`.",
            )
    probabilities = pool([table.probabilities for table in tables], first.task)
    learnable = sum(table.model.learnable for table in tables if table.model is not None)
    return Predictions(
        first.classes, first.rows, probabilities.astype(np.float32), _model(tables, learnable), first.task, first.unit
    )


def _join(tables: Sequence[Predictions]) -> Predictions:
    first, rows = tables[0], [row for table in tables for row in table.rows]
    if len({row.path for row in rows}) != len(rows) or any(table.classes != first.classes for table in tables):
        raise EvaluationError(
            "These evaluations cannot be pooled.", "An image is in two of them, or their classes differ."
        )
    order = sorted(range(len(rows)), key=lambda index: rows[index].path)
    p = np.concatenate([table.probabilities for table in tables])[order]
    model = _model(tables, first.model.learnable if first.model is not None else 0)
    return Predictions(first.classes, tuple(rows[index] for index in order), p, model, first.task, first.unit)


def _model(tables: Sequence[Predictions], learnable: int) -> EvaluatedModel | None:
    """Describe several models as one; None if their methods or LPMs differ or are unknown."""
    models = [table.model for table in tables]
    first = models[0]
    known = [model for model in models if model is not None]
    if first is None or len(known) < len(models) or len({(model.method, model.lpm) for model in known}) > 1:
        return None
    if len(known) == 1:
        return first
    weights = digest([model.weights_sha256 for model in known])
    return first.model_copy(update={"learnable": learnable, "weights_sha256": weights})
