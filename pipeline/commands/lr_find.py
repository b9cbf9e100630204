"""`fpt lr-find`: learning rates on the validation images, all in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import say, score, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from pipeline.sweep_grid import Combination
from schemas.errors import SettingsError, TrainingError
from schemas.methods import METHODS
from schemas.sweeps import RateFinding


def lr_find(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    low: Annotated[float, typer.Option("--from", min=0, help="Lowest rate.")] = 5e-5,
    high: Annotated[float, typer.Option("--to", min=0, help="Highest rate.")] = 5e-3,
    count: Annotated[int, typer.Option("--count", min=2, help="Rates, in equal ratios.")] = 8,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each rate: train.seed, +1, ...")] = 2,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the runs; else outputs/lr-find.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train with several learning rates in one pass and name the one that the validation images prefer.

    Trains to the end with each rate, since the final validation loss decides. Test images are not used. An interrupted
    run continues where it stopped.
    """
    from pipeline.project import open_study
    from pipeline.sweep_jobs import Part, plan_jobs, train_jobs
    from stages.evaluate.sweep_statistics import find_rate
    from stages.files import atomic_write
    from stages.manifest import read_manifest

    if not 0 < low < high:
        raise SettingsError("Learning rates cannot be tried.", [("--from, --to", "must be 0 < from < to")])
    study = open_study(params, assignments or [])
    if METHODS[study.settings.method].closed_form:
        raise SettingsError(
            f"{study.settings.method} has no learning rate.",
            [("method", "is fitted to all training images in closed form")],
            "Choose a method that trains a network, such as --set method=fpt+.",
        )
    manifest = read_manifest(study.manifest)
    files = study.files(manifest)
    folder = study.outputs / "lr-find" if output is None else output.absolute()
    # Two digits: the neighbours differ by far more, and the value can be typed.
    rates = dict.fromkeys(f"{low * (high / low) ** (step / (count - 1)):.2g}" for step in range(count))
    first = study.settings.train.seed
    combinations = [
        Combination({"lr": rate, "seed": str(seed)}) for rate in rates for seed in range(first, first + seeds)
    ]
    part = Part("", manifest, study.settings.data.seed)
    jobs = plan_jobs(study, combinations, [part], files, folder)
    train_jobs(study, files, jobs)
    losses: dict[float, list[float]] = {}
    aucs: dict[float, list[float | None]] = {}
    for job in jobs:
        record = job.record
        if record is None:
            raise TrainingError(f"{job.folder} was changed by another process.", repair="Run `fpt lr-find` again.")
        losses.setdefault(job.settings.train.lr, []).append(record.val_loss)
        aucs.setdefault(job.settings.train.lr, []).append(record.val_auc)
    finding = find_rate(losses, aucs)
    atomic_write(folder / "summary.json", (finding.model_dump_json(indent=1) + "\n").encode())
    if as_json:
        show_json(finding.model_dump(mode="json"))
        return
    _show(finding)


def _show(finding: RateFinding) -> None:
    show_table(
        "Validation images, mean of the seeds",
        ["train.lr", "loss", "smoothed loss", "AUC", ""],
        [
            [
                f"{trial.lr:g}",
                f"{trial.val_loss.mean:.4f}",
                f"{trial.smoothed_loss:.4f}",
                score(None if trial.val_auc is None else trial.val_auc.mean),
                "<- lowest" if trial.lr == finding.lr else "",
            ]
            for trial in finding.trials
        ],
    )
    if finding.at_edge:
        say("It is the last that was tried on its side: a better one may lie beyond (--from, --to).")
    say(f"In params.yaml, under train: lr: {finding.lr:g}   (or once: fpt train --set train.lr={finding.lr:g})")
