"""`fpt compare`: one table of whatever was judged on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import duration, score, show_json, show_table
from pipeline.metric_names import metric_name
from pipeline.options import AsJson
from schemas.tasks import METRICS
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.results import ComparedModel, Comparison


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folders that fpt evaluate wrote, or that hold one named evaluation; the first is the reference.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Compare models that were judged on the same rows: metrics, and differences to the first with 95% intervals."""
    from stages.evaluate.compare import compare as run

    comparison = run(folders)
    if as_json:
        show_json(comparison.model_dump(mode="json"))
    else:
        _show(comparison)


def _show(comparison: Comparison) -> None:
    models = comparison.models
    task = models[0].metrics.task
    show_table(
        f"{comparison.split}: {counted(comparison.images, 'image')} of {counted(comparison.groups, 'group')}",
        ["folder", "method", *(metric_name(name, task) for name in METRICS[task]), "learnable", "training"],
        [_row(row) for row in models],
    )
    show_differences(comparison)


def show_differences(comparison: Comparison) -> None:
    """The table of differences to the first model, where there are some."""
    models = comparison.models
    task = models[0].metrics.task
    paired = [name for name in METRICS[task] if any(name in row.differences for row in models)]
    if paired:
        show_table(
            f"Minus {models[0].name}, with 95% intervals of the paired difference (whole groups are drawn)",
            ["folder", *(metric_name(name, task) for name in paired)],
            [[row.name, *(_difference(row, name) for name in paired)] for row in models[1:]],
        )


def _row(row: ComparedModel) -> list[str]:
    return [
        row.name,
        "-" if row.model is None else row.model.method,
        *(score(getattr(row.metrics, name)) for name in METRICS[row.metrics.task]),
        "-" if row.model is None else f"{row.model.learnable:,}",
        "-" if row.train_seconds is None else duration(row.train_seconds),
    ]


def _difference(row: ComparedModel, name: str) -> str:
    found = row.differences.get(name)
    if found is None:
        return "-"
    interval = "" if found.interval is None else f" ({found.interval[0]:+.3f} to {found.interval[1]:+.3f})"
    return f"{found.value:+.3f}{interval}"
