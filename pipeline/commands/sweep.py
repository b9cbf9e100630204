"""`fpt sweep`: many trainings in one pass over the cached features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.compare import show_differences
from pipeline.console import say, score, show_json, show_models
from pipeline.metric_names import metric_name
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from pipeline.sweep_grid import Combination, draw, grid, parse_axes
from schemas.errors import SettingsError, TrainingError
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study
    from pipeline.sweep_jobs import Job, Part
    from schemas.manifest import Manifest
    from schemas.results import Comparison
    from schemas.sweeps import Spread, SweepSummary, SweptRun, SweptSettings
    from stages.train.inputs import StudyFiles

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
        typer.Option(
            "--random", metavar="N", min=1, max=10_000, help="Draw N combinations instead of all.", show_default=False
        ),
    ] = None,
    random_seed: Annotated[int, typer.Option("--random-seed", help="Random seed of --random.")] = 0,
    splits: Annotated[
        int | None,
        typer.Option(
            "--splits", metavar="N", min=1, max=1000, help="On N splits: data.seed, +1, ...", show_default=False
        ),
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
    """Train every combination in one pass over the cached features, evaluate each, and their ensemble.

    Finished runs are kept: a sweep that was killed, or that gets another value, does only the rest.
    """
    from pipeline.project import open_study
    from pipeline.sweep_jobs import plan_jobs, train_jobs
    from stages.files import atomic_write
    from stages.manifest import read_manifest

    combinations = _combinations(axes or [], random, random_seed, splits, folds)
    study = open_study(params, assignments or [])
    # Imported late, because it loads torch: a folder without a study is an error at once.
    from stages.evaluate.sweep_summary import summarise

    manifest = read_manifest(study.manifest)
    files = study.files(manifest)
    folder = study.outputs / "sweep" if output is None else output.absolute()
    parts = _parts(study, manifest, splits, folds)
    jobs = plan_jobs(study, combinations, parts, files, folder)
    trained = train_jobs(study, files, jobs)
    summary, comparisons = summarise([_evaluated(files, job) for job in jobs], folder / "averaged", folds is not None)
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
    from pipeline.sweep_jobs import Part, ready_split
    from stages.prepare.folds import draw_again, draw_folds

    data = study.settings.data
    ready = ready_split(study)
    if (splits or folds) and ready is not None:
        say(f"The ready split of data.split_column ({ready}) is ignored: splits are drawn.")
    if folds is not None:
        # Training and validation images in the proportion of the settings.
        drawn = draw_folds(manifest, folds, data.val_share / (1.0 - data.test_share), data.seed)
        return [Part(f"fold-{n}-of-{folds}", one, data.seed) for n, one in enumerate(drawn, start=1)]
    if splits is not None:
        seeds = range(data.seed, data.seed + splits)
        drawn_by = {seed: draw_again(manifest, data.val_share, data.test_share, seed) for seed in seeds}
        if ready is None:
            # The study's own split, which known images keep where a fresh draw would move them.
            drawn_by[data.seed] = manifest
        return [Part(f"split-{seed}", one, seed) for seed, one in drawn_by.items()]
    return [Part("", manifest, data.seed)]


def _evaluated(files: StudyFiles, job: Job) -> tuple[SweptRun, Path]:
    """Evaluate a trained run; return it with the folder of its evaluation."""
    from pipeline.sweep_jobs import evaluate_job
    from schemas.sweeps import SweptRun
    from stages.evaluate.sweep_statistics import metric_values

    record = job.record
    if record is None:
        raise TrainingError(f"{job.folder} was changed by another process.", repair="Run `fpt sweep` again.")
    run = SweptRun(
        name=job.name,
        part=job.part.name,
        values=dict(job.combination.values),
        settings=job.combination.settings,
        val_auc=record.val_auc,
        val_loss=record.val_loss,
        test=metric_values(evaluate_job(files, job, record)),
    )
    return run, job.folder / "evaluation"


def _show(summary: SweepSummary, comparisons: Sequence[Comparison]) -> None:
    if 1 < len(summary.runs) <= MANY:
        runs = list(summary.runs.values())
        show_models(
            "Every run",
            "run",
            list(summary.runs),
            {
                "validation AUC": [score(run.val_auc) for run in runs],
                **{name: [score(run.test.get(metric)) for run in runs] for metric, name in SHOWN.items()},
            },
        )
    settings = {**summary.settings, **({"all": summary.all} if len(summary.settings) > 1 else {})}
    rows = list(settings.values())
    together = {"ensemble": [_text(row.averaged_auc) for row in rows]}
    if any(row.pooled_auc is not None for row in rows):
        together = {"pooled over folds": [_text(row.pooled_auc) for row in rows], **together}
    show_models("Mean and standard deviation of the runs", "settings", list(settings), {**_values(rows), **together})
    for axis, values in summary.axes.items():
        if len(summary.axes) > 1:
            show_models(f"By {axis}", axis, list(values), _values(list(values.values())))
    if len(comparisons) == 1:
        show_differences(comparisons[0])
    elif comparisons:
        first, *others = summary.differences
        task = comparisons[0].models[0].metrics.task
        metrics = list(summary.differences[first])
        names = [first, *others]
        show_models(
            f"Difference to {comparisons[0].models[0].name}, ensembles: mean and standard deviation of the splits",
            "settings",
            names,
            {
                metric_name(metric, task): [_text(summary.differences[name][metric].difference, "+") for name in names]
                for metric in metrics
            },
        )
    best = summary.settings[summary.best]
    test = _text(best.test.get("auc"))
    say(f"Best by validation: {summary.best}, validation AUC {_text(best.val_auc)}, test AUC {test}.")
    if summary.chosen_test_auc is not None and len(summary.settings) > 1:
        say(f"Test AUC of what validation chooses in each split: {_text(summary.chosen_test_auc)}.")


def _values(rows: Sequence[SweptSettings]) -> dict[str, list[str]]:
    """Name of a number -> its text for each of the settings."""
    return {
        "runs": [str(row.runs) for row in rows],
        "validation AUC": [_text(row.val_auc) for row in rows],
        **{name: [_text(row.test.get(metric)) for row in rows] for metric, name in SHOWN.items()},
    }


def _text(found: Spread | None, sign: str = "") -> str:
    if found is None:
        return "-"
    deviation = "" if found.std is None else f" ({found.std:.3f})"
    return f"{found.mean:{sign}.3f}{deviation}"
