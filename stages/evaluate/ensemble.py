"""Several judged models as one: the average of their log-probabilities, a logarithmic opinion pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from schemas.errors import EvaluationError
from schemas.results import Metrics
from stages.evaluate.metrics import compute_metrics
from stages.evaluate.predictions import read_predictions
from stages.tasks import pool


def judge_together(folders: Sequence[Path]) -> Metrics:
    """Metrics of the average of evaluations of the same rows.

    Args:
        folders: Each from `evaluate`.

    Raises:
        EvaluationError: There are none, or they are of other rows or classes.
    """
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
    shares = pool([table.probabilities for table in tables], first.task)
    groups = [row.group for row in first.rows]
    split = first.rows[0].split
    return compute_metrics(first.labels, shares, first.classes, groups=groups, split=split, task=first.task)
