"""`fpt sweep`: many trainings in one pass over the cached features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.axes import Combination, draw, grid, parse_axes
from pipeline.commands.compare import show_differences
from pipeline.console import say, score, show_json, show_table
from pipeline.metric_names import metric_name
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import SettingsError, TrainingError
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study
    from pipeline.runs import Job, Part
    from schemas.manifest import Manifest
    from schemas.results import Comparison
    from schemas.sweeps import RunRecord, Spread, SweepSummary, SweptRun, SweptSettings

SHOWN = {"auc": "test AUC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
MANY = 40
"""Runs beyond which the table of single runs is left to `summary.json`."""


def sweep(
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,VALUE]...",
            help="Values of a train setting, such as lr=2e-4,5e-4 or seed=0..4, or method=fpt+,linear; axes are "
            "all combined. A range such as lr=1e-4..5e-3 is for --random.",
            show_default=False,
        ),
    ] = None,
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    random: Annotated[
        int | None,
        typer.Option("--random", metavar="N", min=1, help="Draw N combinations instead of all.", show_default=False),
    ] = None,
    random_seed: Annotated[int, typer.Option("--random-seed", help="Of the draws.")] = 0,
    splits: Annotated[
        int | None,
        typer.Option("--splits", metavar="N", min=1, help="On N splits: data.seed, +1, ...", show_default=False),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option("--folds", metavar="K", min=2, help="Cross-validate: test each image once.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the runs; else outputs/sweep.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train every combination in one pass over the cached features, judge each, and all of them together.

    Finished runs are kept: a sweep that was killed, or that gets another value, does only the rest.
    """
    from pipeline.project import open_study
    from pipeline.runs import judge_job, plan_jobs, train_jobs
    from stages.evaluate.summary import summarise
    from stages.evaluate.sweeps import metric_values
    from stages.extract.receipt import read_extraction_receipt
    from stages.files import atomic_write
    from stages.manifest import read_manifest

    combinations = _combinations(axes or [], random, random_seed, splits, folds)
    study = open_study(params, assignments or [])
    manifest, receipt = read_manifest(study.manifest), read_extraction_receipt(study.receipt)
    folder = study.outputs / "sweep" if output is None else output.absolute()
    parts = _parts(study, manifest, splits, folds)
    jobs = plan_jobs(study, params, assignments or [], combinations, parts, receipt, folder)
    trained = train_jobs(study, receipt, jobs)
    runs: list[tuple[SweptRun, Path]] = []
    for job in jobs:
        record = job.record
        if record is None:
            raise TrainingError(f"{job.folder} was changed by another process.", repair="Run `fpt sweep` again.")
        metrics = judge_job(study, receipt, job, record)
        runs.append((_swept(job, record, metric_values(metrics)), job.folder / "evaluation"))
    summary, comparisons = summarise(runs, folder / "averaged", folds is not None)
    atomic_write(folder / "summary.json", (summary.model_dump_json(indent=1) + "\n").encode())
    if as_json:
        show_json(summary.model_dump(mode="json"))
        return
    say(f"{counted(trained, 'run')} {'was' if trained == 1 else 'were'} trained, {len(jobs) - trained} were there.")
    _show(summary, comparisons)
    say(f"Each run has its model/ and evaluation/ below {folder / 'runs'}; everything is in {folder / 'summary.json'}")


def _combinations(
    axes: Sequence[str], random: int | None, random_seed: int, splits: int | None, folds: int | None
) -> list[Combination]:
    parsed = parse_axes(axes)
    if splits is not None and folds is not None:
        raise SettingsError("--folds and --splits are two ways to test.", repair="Choose one of them.")
    if not parsed and splits is None and folds is None:
        raise SettingsError("There is nothing to sweep.", repair="Name values, such as lr=2e-4,5e-4, or --folds 5.")
    return grid(parsed) if random is None else draw(parsed, random, random_seed)


def _parts(study: Study, manifest: Manifest, splits: int | None, folds: int | None) -> list[Part]:
    from pipeline.runs import Part
    from stages.prepare.folds import draw_again, draw_folds

    data = study.settings.data
    if (splits or folds) and data.split_column is not None:
        say(f"The ready split of data.split_column ({data.split_column}) is left aside: splits are drawn.")
    if folds is not None:
        # Training and validation images in the proportion of the settings.
        drawn = draw_folds(manifest, folds, data.val_share / (1.0 - data.test_share), data.seed)
        return [Part(f"fold-{n}-of-{folds}", one, data.seed) for n, one in enumerate(drawn, start=1)]
    if splits is not None:
        seeds = range(data.seed, data.seed + splits)
        return [
            Part(f"split-{seed}", draw_again(manifest, data.val_share, data.test_share, seed), seed) for seed in seeds
        ]
    return [Part("", manifest, data.seed)]


def _swept(job: Job, record: RunRecord, test: dict[str, float]) -> SweptRun:
    from schemas.sweeps import SweptRun

    return SweptRun(
        name=job.name,
        part=job.part.name,
        values=dict(job.combination.values),
        settings=job.combination.settings,
        val_auc=record.val_auc,
        val_loss=record.val_loss,
        test=test,
    )


def _show(summary: SweepSummary, comparisons: Sequence[Comparison]) -> None:
    if 1 < len(summary.runs) <= MANY:
        show_table(
            "Every run",
            ["run", "validation AUC", *SHOWN.values()],
            [
                [name, score(run.val_auc), *(score(run.test.get(metric)) for metric in SHOWN)]
                for name, run in summary.runs.items()
            ],
        )
    pooled = any(row.pooled_auc is not None for row in summary.settings.values())
    columns = ["runs", "validation AUC", *SHOWN.values(), *(["all folds at once"] if pooled else []), "averaged"]
    rows = [*summary.settings.items(), *([("all", summary.all)] if len(summary.settings) > 1 else [])]
    show_table("Mean and standard deviation of the runs", ["settings", *columns], [_row(*row, pooled) for row in rows])
    for axis, values in summary.axes.items():
        if len(summary.axes) > 1:
            one = ["runs", "validation AUC", *SHOWN.values()]
            show_table(f"By {axis}", [axis, *one], [_row(*row, pooled)[: len(one) + 1] for row in values.items()])
    if len(comparisons) == 1:
        show_differences(comparisons[0])
    elif comparisons:
        first, *others = summary.differences
        task = comparisons[0].models[0].metrics.task
        metrics = list(summary.differences[first])
        show_table(
            f"Minus {comparisons[0].models[0].name}, runs averaged: mean and standard deviation of the splits",
            ["settings", *(metric_name(metric, task) for metric in metrics)],
            [
                [name, *(_text(summary.differences[name][metric].difference, "+") for metric in metrics)]
                for name in (first, *others)
            ],
        )
    best = summary.settings[summary.best]
    test = _text(best.test.get("auc"))
    say(f"Best by validation: {summary.best}, validation AUC {_text(best.val_auc)}, test AUC {test}.")
    if summary.chosen_test_auc is not None and len(summary.settings) > 1:
        say(f"Test AUC of what validation chooses in each split: {_text(summary.chosen_test_auc)}.")


def _row(name: str, row: SweptSettings, pooled: bool) -> list[str]:
    return [
        name,
        str(row.runs),
        _text(row.val_auc),
        *(_text(row.test.get(metric)) for metric in SHOWN),
        *([_text(row.pooled_auc)] if pooled else []),
        _text(row.averaged_auc),
    ]


def _text(found: Spread | None, sign: str = "") -> str:
    if found is None:
        return "-"
    deviation = "" if found.std is None else f" ({found.std:.3f})"
    return f"{found.mean:{sign}.3f}{deviation}"
