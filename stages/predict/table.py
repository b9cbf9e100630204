"""Predictions as CSV: path, predicted, p_<class> for every class, error."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from schemas.results import PROBABILITY, Prediction
from stages.files import atomic_write


def predictions_csv(rows: Sequence[Prediction]) -> str:
    """The table as text. Probabilities have six digits; without any usable image there are no such columns."""
    classes = next((list(row.probabilities) for row in rows if row.probabilities is not None), [])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "predicted", *(f"{PROBABILITY}{name}" for name in classes), "error"])
    for row in rows:
        shares = row.probabilities or {}
        cells = [f"{shares[name]:.6f}" if name in shares else "" for name in classes]
        writer.writerow([row.path, row.predicted or "", *cells, row.error or ""])
    return text.getvalue()


def write_predictions_csv(rows: Sequence[Prediction], path: Path) -> None:
    """Write the table as a UTF-8 file, whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    atomic_write(path, predictions_csv(rows).encode())
