"""Tables of a shift bench, for the terminal and as `shift.html`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from schemas.methods import METHODS
from schemas.shift import SHIFT_METRICS, ShiftResult, ShiftRow
from stages.evaluate.bench_report import title_of
from stages.evaluate.pages import page_template
from stages.evaluate.predictions import Predictions
from stages.evaluate.scoring import score

SHOWN = {"auc": "AUC", "accuracy": "accuracy", "calibration_error": "ECE"}
"""Metrics of the tables, with their names."""


def shift_metrics(predictions: Predictions) -> dict[str, float]:
    """Return the metrics of a condition that are defined."""
    metrics = score(predictions)
    values = {name: getattr(metrics, name) for name in SHIFT_METRICS}
    return {name: float(value) for name, value in values.items() if value is not None}


def shots_of(result: ShiftResult) -> list[str]:
    """Return the numbers of shots of a result, in order."""
    return list(dict.fromkeys(row.shots for row in result.rows))


def columns_of(result: ShiftResult) -> list[str]:
    """Return the columns of a table: the unchanged images, each corruption, and each held-out site."""
    return list(dict.fromkeys(_column(row) for row in result.rows))


def table_of(result: ShiftResult, shots: str, metric: str) -> list[list[str]]:
    """Return the rows of a table: method, adaptation, and the mean over strengths (and runs) of each column."""
    columns = columns_of(result)
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in result.rows:
        if row.shots == shots:
            own = cells.setdefault((row.method, row.adapt or "none"), {})
            if metric in row.metrics:
                own.setdefault(_column(row), []).append(row.metrics[metric].mean)
    order = sorted(cells, key=lambda name: list(dict.fromkeys(method for method, _ in cells)).index(name[0]))
    return [[*name, *(_mean(cells[name].get(column, [])) for column in columns)] for name in order]


def _column(row: ShiftRow) -> str:
    return row.condition.shift if row.condition.site is None else row.condition.name


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def render_shift(result: ShiftResult) -> str:
    """Return the page as one HTML text without a reference to another file."""
    template = page_template(files("stages.evaluate").joinpath("shift.html.j2").read_text(encoding="utf-8"))
    strengths = sorted({row.condition.strength for row in result.rows if row.condition.strength})
    tables = [
        {"title": f"{title_of(shots)}: {name}", "rows": table_of(result, shots, metric)}
        for shots in shots_of(result)
        for metric, name in SHOWN.items()
    ]
    details = [
        [
            title_of(row.shots),
            METHODS[row.method].title,
            row.condition.name,
            row.adapt or "none",
            *(f"{row.metrics[metric].mean:.3f}" if metric in row.metrics else "-" for metric in SHOWN),
        ]
        for row in result.rows
    ]
    return template.render(
        title="Methods on shifted images",
        result=result,
        columns=columns_of(result),
        strengths=strengths,
        tables=tables,
        details=details,
        shown=list(SHOWN.values()),
    )
