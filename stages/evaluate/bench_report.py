"""`bench.html`: the tables of a bench and its plots of memory and accuracy, in one file without a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

from schemas.bench import ALL_SHOTS, BenchResult, BenchRow
from schemas.methods import METHODS
from schemas.sweeps import Separation, Spread
from schemas.text import counted, images_of
from stages.evaluate.figures import draw_memory
from stages.evaluate.pages import page_template

COLUMNS = (
    "AUC",
    "difference",
    "balanced accuracy",
    "ECE",
    "Brier",
    "log loss",
    "learnable",
    "MiB",
    "seconds",
    "PPE",
    "PME",
    "silhouette",
    "margin",
    "effective rank",
    "rate",
)
"""Columns of a table, after the name of the method."""


def title_of(shots: str) -> str:
    """Return the title of the table of a number of shots."""
    return "All training images" if shots == ALL_SHOTS else f"{counted(int(shots), 'patient')} per class"


def cells(row: BenchRow) -> list[str]:
    """Return the cells of `COLUMNS`; a dash for what is not defined."""
    separation = row.separation or Separation(silhouette=None, margin=None, effective_rank=None)
    return [
        spread_text(row.auc),
        difference_text(row),
        *(_mean(row, name) for name in ("balanced_accuracy", "calibration_error", "brier", "log_loss")),
        f"{row.learnable:,}",
        _number(row.tensor_mib, ",.1f"),
        _number(None if row.seconds is None else row.seconds.mean, ",.1f"),
        _number(row.ppe),
        _number(row.pme),
        _number(separation.silhouette),
        _number(separation.margin),
        _number(separation.effective_rank, ".1f"),
        rates_text(list(row.rates.values())),
    ]


def spread_text(values: Spread | None) -> str:
    """Return the mean with the standard deviation in parentheses."""
    if values is None:
        return "-"
    return f"{values.mean:.3f}" + ("" if values.std is None else f" ({values.std:.3f})")


def difference_text(row: BenchRow) -> str:
    """Return the difference to the reference with its interval."""
    if row.difference is None:
        return "-"
    interval = row.difference.interval
    ends = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{row.difference.difference.mean:+.3f}{ends}"


def rates_text(rates: Sequence[float]) -> str:
    """Return the chosen learning rates in ascending order, each with its number of choices where they differ."""
    distinct = sorted(set(rates))
    if len(distinct) < 2:
        return f"{distinct[0]:g}" if distinct else "-"
    return ", ".join(f"{rate:g} ({rates.count(rate)})" for rate in distinct)


def _mean(row: BenchRow, name: str) -> str:
    return _number(row.test[name].mean if name in row.test else None)


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def render_bench(result: BenchResult) -> str:
    """Return the page as one HTML text without a reference to another file."""
    template = page_template(files("stages.evaluate").joinpath("bench.html.j2").read_text(encoding="utf-8"))
    before = result.before
    return template.render(
        title=f"Methods on {result.lpm}",
        tested=images_of(result.test_images, result.test_groups, result.unit),
        result=result,
        reference=METHODS[result.reference].title,
        columns=COLUMNS,
        tables=[
            {
                "title": title_of(shots),
                "rows": [{"name": METHODS[name].title, "cells": cells(row)} for name, row in rows.items()],
                "figure": _figure(result, shots),
                "alt": _alt(rows.values()),
            }
            for shots, rows in result.shots.items()
            if rows
        ],
        before=None
        if before is None
        else f"silhouette {_number(before.silhouette)}, margin {_number(before.margin)}, "
        f"effective rank {_number(before.effective_rank, '.1f')}",
    )


def _figure(result: BenchResult, shots: str) -> str | None:
    points = {
        METHODS[name].title: (row.tensor_mib, row.auc.mean, row.auc.std)
        for name, row in result.shots[shots].items()
        if row.auc is not None
    }
    return draw_memory(points, result.full_finetune_tensor_mib, f"memory{shots}") if points else None


def _alt(rows: Iterable[BenchRow]) -> str:
    return "Test AUC by tensor memory of a training step: " + "; ".join(
        f"{METHODS[row.method].title} {spread_text(row.auc)} at {_number(row.tensor_mib, ',.1f')} MiB" for row in rows
    )
