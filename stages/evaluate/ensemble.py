"""Several judged models as one: the average of their log-probabilities, a logarithmic opinion pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas.base import digest
from schemas.errors import EvaluationError
from schemas.results import EvaluatedModel, Metrics
from stages.evaluate.predictions import Predictions, read_predictions, write_predictions
from stages.evaluate.scoring import score
from stages.files import atomic_write
from stages.tasks import pool as log_pool


def judge_together(folders: Sequence[Path]) -> Metrics:
    """Metrics of the average of evaluations of the same rows.

    Args:
        folders: Each from `evaluate`.

    Raises:
        EvaluationError: There are none, or they are of other rows or classes.
    """
    return score(_average(folders))


def pool(parts: Sequence[Sequence[Path]], output: Path | None = None) -> Metrics:
    """One judgement of all parts of a cross-validation: in each, models are averaged; then the parts are joined.

    Args:
        parts: Of each split or fold the evaluations of the same rows; no row is in two parts.
        output: Folder for `predictions.parquet` and `metrics.json`, which `compare` reads; None: nothing is written.

    Raises:
        EvaluationError: Evaluations of one part are of other rows or classes, or a row is in two parts.
        StorageError: The output cannot be written.
    """
    table = _join([_average(folders) for folders in parts])
    metrics = score(table)
    if output is not None:
        write_predictions(table, output / "predictions.parquet")
        atomic_write(output / "metrics.json", (metrics.model_dump_json(indent=1) + "\n").encode())
    return metrics


def _average(folders: Sequence[Path]) -> Predictions:
    tables = [read_predictions(folder / "predictions.parquet") for folder in folders]
    if not tables:
        raise EvaluationError("There is nothing to average.", repair="Name folders that `fpt evaluate` wrote.")
    first = tables[0]
    for folder, table in zip(folders, tables, strict=True):
        if (table.rows, table.classes, table.task) != (first.rows, first.classes, first.task):
            raise EvaluationError(
                f"{folder} judges other rows, classes or tasks than {folders[0]}.",
                "They are of different splits or studies.",
                "Judge both again with `fpt evaluate`.",
            )
    shares = log_pool([table.probabilities for table in tables], first.task)
    learnable = sum(table.model.learnable for table in tables if table.model is not None)
    return Predictions(
        first.classes, first.rows, shares.astype(np.float32), _model(tables, learnable), first.task, first.unit
    )


def _join(tables: Sequence[Predictions]) -> Predictions:
    first, rows = tables[0], [row for table in tables for row in table.rows]
    if len({row.path for row in rows}) != len(rows) or any(table.classes != first.classes for table in tables):
        raise EvaluationError(
            "These evaluations cannot be joined.", "An image is in two of them, or they are of other classes."
        )
    order = sorted(range(len(rows)), key=lambda place: rows[place].path)
    p = np.concatenate([table.probabilities for table in tables])[order]
    model = _model(tables, first.model.learnable if first.model is not None else 0)
    return Predictions(first.classes, tuple(rows[place] for place in order), p, model, first.task, first.unit)


def _model(tables: Sequence[Predictions], learnable: int) -> EvaluatedModel | None:
    """One description of several models; None where they are of several kinds, or unknown."""
    models = [table.model for table in tables]
    first = models[0]
    known = [model for model in models if model is not None]
    if first is None or len(known) < len(models) or len({(model.method, model.lpm) for model in known}) > 1:
        return None
    if len(known) == 1:
        return first
    weights = digest([model.weights_sha256 for model in known])
    return first.model_copy(update={"learnable": learnable, "weights_sha256": weights})
