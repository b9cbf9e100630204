"""Collect a bench from the records of its runs, and write it: bench.json, bench.csv, runs.csv, bench.html."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench_plan import Asked, Group, Plan
from pipeline.bench_runs import chosen, trials
from schemas.bench import BenchResult, BenchRow, BenchRun
from schemas.errors import FptError
from schemas.methods import METHODS
from schemas.results import Metrics
from schemas.version import DISTRIBUTION, __version__
from stages.tables import csv_text, safe_cell

if TYPE_CHECKING:
    from pipeline.project import Study
    from pipeline.sweep_jobs import Job
    from stages.train.inputs import StudyFiles

PACKAGES = ("torch", "timm", "numpy", "scikit-learn", "pyarrow", "zarr")
"""Packages whose versions are recorded."""
VALUES = ("auc", "balanced_accuracy", "calibration_error", "brier", "log_loss")
"""Test metrics of `bench.csv`."""


def collect(
    study: Study, files: StudyFiles, plan: Plan, asked: Asked, reference: str, failed: Mapping[str, str], folder: Path
) -> BenchResult:
    """Read the records and predictions of all finished runs.

    Args:
        study: The study.
        files: What training read.
        plan: What was planned.
        asked: Options.
        reference: Method that the others are compared with.
        failed: Method -> why it failed.
        folder: Folder of the bench.

    Raises:
        EvaluationError: Predictions are damaged.
    """
    from stages.device import pick_device
    from stages.evaluate.separation import separation_of_lpm
    from stages.train.cost import full_finetune_cost

    settings, manifest = study.settings, files.manifest
    classes = manifest.classes
    full = full_finetune_cost(
        settings.lpm.name, study.lpm.image_size, len(classes), settings.train.batch_size, study.root
    )
    tested = list(manifest.of("test"))
    shots = {}
    for name in dict.fromkeys(group.sampling.shots for group in plan.groups):
        shots[name] = _rows(
            [group for group in plan.groups if group.sampling.shots == name], plan, reference, full, folder
        )
    return BenchResult(
        task=manifest.task,
        lpm=study.lpm.name,
        image_size=study.lpm.image_size,
        classes=classes,
        test_images=len(tested),
        test_groups=len({row.group for row in tested}),
        unit=manifest.unit,
        reference=reference,
        full_finetune_tensor_mib=full[1],
        lpm_parameters=full[0],
        before=separation_of_lpm(files),
        shots=shots,
        left_out={**plan.left_out, **failed},
        settings={
            "samplings": asked.samplings,
            "seeds": asked.seeds,
            "rates": {
                method: list(asked.rates or METHODS[method].rates)
                for method in plan.methods
                if not METHODS[method].closed_form
            },
            "study": settings.model_dump(mode="json"),
        },
        machine=_machine(pick_device(settings.compute.device)),
        versions=_versions(),
    )


def _rows(
    groups: Sequence[Group], plan: Plan, reference: str, full: tuple[int, float], folder: Path
) -> dict[str, BenchRow]:
    """Return the rows of a number of shots: methods that finished every sampling of it."""
    from stages.evaluate.bench_summary import auc_difference, mean_loss, read_tables, summarise_method

    picked: dict[str, list[tuple[Group, list[Job]]]] = {}
    for method in dict.fromkeys(group.method for group in groups):
        members = [group for group in groups if group.method == method]
        runs = [(group, _finished(group)) for group in members]
        if all(jobs for _, jobs in runs):
            picked[method] = runs
    tables = {
        method: read_tables(
            {group.sampling.number: [job.folder / "evaluation" for job in jobs] for group, jobs in runs}
        )
        for method, runs in picked.items()
    }
    rows = {}
    for method, runs in picked.items():
        compared = method != reference and reference in tables
        cost = plan.costs.get(method)
        rows[method] = summarise_method(
            method,
            [_run(group, job, folder) for group, jobs in runs for job in jobs],
            {
                str(group.sampling.number): {
                    rate: mean_loss(records) if records else None for rate, records in trials(group).items() if rate
                }
                for group, _ in runs
            },
            difference=auc_difference(tables[reference], tables[method]) if compared else None,
            lpm_parameters=full[0],
            tensor_mib=None if cost is None else cost.train_tensor_mib,
            full_mib=full[1],
        )
    return rows


def _finished(group: Group) -> list[Job]:
    """Return the evaluated runs with the chosen learning rate; none where one of them is missing."""
    try:
        jobs = chosen(group)
    except FptError:
        return []
    return jobs if all(job.record is not None and job.record.judged for job in jobs) else []


def _run(group: Group, job: Job, folder: Path) -> BenchRun:
    from stages.evaluate.bench_summary import log_loss
    from stages.evaluate.predictions import TABLE, read_predictions
    from stages.evaluate.sweep_statistics import metric_values
    from stages.files import read_regular
    from stages.train.bundle_spec import read_spec

    record = job.record
    if record is None:
        raise FptError(f"{job.folder} was changed by another process.", repair="Run `fpt bench` again.")
    evaluation, closed_form = job.folder / "evaluation", METHODS[group.method].closed_form
    metrics = Metrics.model_validate_json(read_regular(evaluation / "metrics.json"))
    table = read_predictions(evaluation / TABLE)
    return BenchRun(
        sampling=group.sampling.number,
        seed=None if closed_form else job.settings.train.seed,
        rate=None if closed_form else job.settings.train.lr,
        folder=job.folder.relative_to(folder).as_posix(),
        best_epoch=record.best_epoch,
        val_auc=record.val_auc,
        val_loss=record.val_loss,
        seconds=record.seconds,
        learnable=read_spec(job.folder / "model").learnable,
        test={**metric_values(metrics), "log_loss": log_loss(table)},
        separation=record.separation,
    )


def _machine(device: Any) -> dict[str, str]:
    import torch

    from stages.doctor.machine import allowed_cores

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "system": platform.platform(),
        "device": f"{device.type}: {name}",
        "cores": str(allowed_cores()),
        "threads": str(torch.get_num_threads()),
    }


def _versions() -> dict[str, str]:
    return {
        DISTRIBUTION: __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def write_result(result: BenchResult, folder: Path) -> None:
    """Write the four files.

    Raises:
        StorageError: If the folder cannot be written.
    """
    from stages.evaluate.bench_report import render_bench
    from stages.files import atomic_write

    atomic_write(folder / "bench.csv", rows_as_csv(table_rows(result)))
    atomic_write(folder / "runs.csv", rows_as_csv(run_rows(result)))
    atomic_write(folder / "bench.html", render_bench(result).encode())
    atomic_write(folder / "bench.json", (result.model_dump_json(indent=1) + "\n").encode())


def table_rows(result: BenchResult) -> list[dict[str, Any]]:
    """Return the rows of `bench.csv`: a row per number of shots and method."""
    rows = []
    for shots, methods in result.shots.items():
        for method, row in methods.items():
            paired = row.difference
            interval = (None, None) if paired is None or paired.interval is None else paired.interval
            separation = row.separation
            rows.append(
                {
                    "shots": shots,
                    "method": method,
                    "runs": len(row.runs),
                    **{name: row.test[name].mean if name in row.test else None for name in VALUES},
                    "auc_std": None if row.auc is None else row.auc.std,
                    "auc_difference": None if paired is None else paired.difference.mean,
                    "auc_difference_low": interval[0],
                    "auc_difference_high": interval[1],
                    "learnable": row.learnable,
                    "learnable_share": row.learnable_share,
                    "tensor_mib": row.tensor_mib,
                    "seconds": None if row.seconds is None else row.seconds.mean,
                    "ppe": row.ppe,
                    "pme": row.pme,
                    **{
                        f"{name}_{when}": None if measured is None else getattr(measured, name)
                        for name in ("silhouette", "margin", "effective_rank")
                        for when, measured in (("before", result.before), ("after", separation))
                    },
                    "rates": " ".join(f"{rate:g}" for rate in row.rates.values()),
                }
            )
    return rows


def run_rows(result: BenchResult) -> list[dict[str, Any]]:
    """Return the rows of `runs.csv`: a row per run with a chosen learning rate, with every test metric."""
    every = [
        (shots, method, run)
        for shots, methods in result.shots.items()
        for method, row in methods.items()
        for run in row.runs
    ]
    names = dict.fromkeys(name for _, _, run in every for name in run.test)
    plain = ("sampling", "seed", "rate", "best_epoch", "val_auc", "val_loss", "seconds", "learnable", "folder")
    return [
        {
            "shots": shots,
            "method": method,
            **{name: getattr(run, name) for name in plain},
            **{f"test_{name}": run.test.get(name) for name in names},
        }
        for shots, method, run in every
    ]


def rows_as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a table as CSV, with the names of the first row as header and text escaped (`safe_cell`)."""
    if not rows:
        return b""
    names = list(rows[0])
    return csv_text([names, *([_cell(row[name]) for name in names] for row in rows)]).encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return safe_cell(value) if isinstance(value, str) else str(value)
