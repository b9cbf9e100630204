"""`fpt compare`: one table of all evaluations of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import duration, score, show, show_json, show_models
from pipeline.metric_names import metric_name
from pipeline.options import AsJson
from schemas.tasks import METRICS
from schemas.text import images_of

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
    """Compare models evaluated on the same images: metrics, and differences to the first with 95% intervals."""
    from stages.evaluate.predictions import evaluation_folder

    for folder in folders:
        evaluation_folder(folder)
    # Imported late, because it loads torch: a folder without predictions is an error at once.
    from stages.evaluate.compare import compare as run

    comparison = run(folders)
    if as_json:
        show_json(comparison.model_dump(mode="json"))
    else:
        _show(comparison)


def _show(comparison: Comparison) -> None:
    models = comparison.models
    task = models[0].metrics.task
    metrics = [row.metrics for row in models]
    for warning in dict.fromkeys(warning for row in models for warning in row.metrics.warnings):
        show(f"Warning: {warning}")
    show_models(
        f"{comparison.split}: {images_of(comparison.images, comparison.groups, comparison.unit)}",
        "",
        [row.name for row in models],
        {
            "method": ["-" if row.model is None else row.model.method for row in models],
            **{metric_name(name, task): [score(getattr(one, name)) for one in metrics] for name in METRICS[task]},
            "learnable": ["-" if row.model is None else f"{row.model.learnable:,}" for row in models],
            "training": ["-" if row.train_seconds is None else duration(row.train_seconds) for row in models],
        },
    )
    show_differences(comparison)


def show_differences(comparison: Comparison) -> None:
    """Print the table of differences to the first model, if any."""
    models = comparison.models
    task = models[0].metrics.task
    paired = [name for name in METRICS[task] if any(name in row.differences for row in models)]
    if paired:
        show_models(
            f"Difference to {models[0].name}, with 95% paired bootstrap intervals, resampled by group",
            "",
            [row.name for row in models[1:]],
            {metric_name(name, task): [_difference(row, name) for row in models[1:]] for name in paired},
        )


def _difference(row: ComparedModel, name: str) -> str:
    found = row.differences.get(name)
    if found is None:
        return "-"
    interval = "" if found.interval is None else f" ({found.interval[0]:+.3f} to {found.interval[1]:+.3f})"
    return f"{found.value:+.3f}{interval}"
