"""Several judged models as one: the average of their log-probabilities, a logarithmic opinion pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas.errors import EvaluationError
from schemas.results import Metrics
from stages.evaluate.metrics import compute_metrics
from stages.evaluate.predictions import read_predictions

LEAST = 1e-12
"""A probability below this counts as this: its logarithm would outweigh every other model."""


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
        if table.rows != first.rows or table.classes != first.classes:
            raise EvaluationError(
                f"{folder} judges other rows or classes than {folders[0]}.",
                "They are of different splits or studies.",
                "Judge both again with `fpt evaluate`.",
            )
    pool = np.mean([np.log(np.maximum(table.probabilities, LEAST)) for table in tables], axis=0)
    shares = np.exp(pool - pool.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    groups = [row.group for row in first.rows]
    return compute_metrics(first.labels, shares, first.classes, groups=groups, split=first.rows[0].split)
