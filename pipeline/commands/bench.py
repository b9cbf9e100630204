"""`fpt bench`: which way to adapt the LPM is right for these images, these labels and this memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from pipeline import adapt_options, shift_options
from pipeline.console import duration, say, show_json, show_table
from pipeline.options import METHOD_NAMES, PARAMS_FILE, AsJson, Assignments, Params, comma_separated
from schemas.bench import ALL_SHOTS
from schemas.errors import SettingsError, TrainingError
from schemas.methods import METHODS
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.bench_plan import Asked, Plan
    from pipeline.project import Study
    from schemas.bench import BenchPlan, BenchResult
    from stages.train.inputs import StudyFiles

DEFAULT_REFERENCE = "linear"
"""Method that the others are compared with, where it runs and none is named."""
MAIN = 10
"""Columns of the terminal table: the first of `stages.evaluate.bench_report.COLUMNS`, and the learning rates."""


Methods: TypeAlias = Annotated[
    str | None,
    typer.Option("--methods", metavar="NAME,NAME", help=f"{METHOD_NAMES}; else all that can.", show_default=False),
]
Reference: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--reference", metavar="METHOD", help="Compare with this; else the first, or linear.", show_default=False
    ),
]
Shots: TypeAlias = Annotated[
    str, typer.Option("--shots", metavar="K,K", help="Patients per class; all: the splits of the study.")
]
Samplings: TypeAlias = Annotated[
    int, typer.Option("--samplings", min=1, max=1000, help="Draws of each number of shots.")
]
Seeds: TypeAlias = Annotated[
    int, typer.Option("--seeds", min=1, max=1000, help="Trainings per draw and learning rate.")
]
Rates: TypeAlias = Annotated[
    str | None,
    typer.Option("--rates", metavar="LR,LR", help="Learning rates in place of each method's.", show_default=False),
]
Epochs: TypeAlias = Annotated[int | None, typer.Option("--epochs", min=1, help="As train.epochs.", show_default=False)]
Memory: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--memory", metavar="GIB", min=0.001, help="Limit of a training step; else the device.", show_default=False
    ),
]
Output: TypeAlias = Annotated[
    Path | None, typer.Option("--output", help="Folder of the runs; else outputs/bench.", show_default=False)
]
ShowPlan: TypeAlias = Annotated[bool, typer.Option("--plan", help="Print runs, memory and time, and train nothing.")]
Cluster: TypeAlias = Annotated[
    bool, typer.Option("--cluster", help="Train on the Dask workers of the section cluster of the settings.")
]


def bench(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    methods: Methods = None,
    reference: Reference = None,
    shots: Shots = ALL_SHOTS,
    samplings: Samplings = 5,
    seeds: Seeds = 1,
    rates: Rates = None,
    epochs: Epochs = None,
    memory: Memory = None,
    output: Output = None,
    plan: ShowPlan = False,
    cluster: Cluster = False,
    shift: shift_options.Shift = False,
    shifts: shift_options.Shifts = None,
    strengths: shift_options.Strengths = "1,2,3,4,5",
    adapts: shift_options.Adapts = "foa-shift",
    adapt_batch: adapt_options.Batch = adapt_options.DEFAULTS.batch,
    adapt_seed: adapt_options.Seed = adapt_options.DEFAULTS.seed,
    as_json: AsJson = False,
) -> None:
    """Compare methods on the same images: each with the learning rate that validation chooses, in one table.

    Finished runs are kept: a bench that was killed, or that gets another method, does only the rest. With --shift the
    table is that of shifted images, without and with adaptation at test time.
    """
    from pipeline.bench_plan import Asked, describe_plan, draw_samplings, plan_bench
    from pipeline.project import open_study
    from stages.manifest import read_manifest

    names = _methods(methods)
    asked = Asked(names, _shots(shots), samplings, seeds, _rates(rates))
    shifted = shift_options.shift_asked(shifts, strengths, adapts, adapt_batch, adapt_seed) if shift else None
    if reference is not None and reference not in names:
        raise SettingsError(f"The reference {reference} is not among the methods.", repair=f"Use {', '.join(names)}.")
    study = open_study(params, [*(assignments or []), *([] if epochs is None else [f"train.epochs={epochs}"])])
    if cluster:
        _check_cluster(study)
    manifest = read_manifest(study.manifest)
    files = study.files(manifest)
    folder = study.outputs / "bench" if output is None else output.absolute()
    limit = _limit(study, memory, cluster)
    planned = plan_bench(study, files, asked, draw_samplings(study, manifest, asked), folder, limit)
    if plan:
        _show_plan(describe_plan(planned, files, study.checkpoints, limit), as_json)
        if shifted is not None:
            shift_options.show_shift_plan(planned.groups, files, shifted)
        return
    _name_left_out(planned.left_out)
    result = _run(study, files, asked, planned, _reference(reference, methods, planned), folder, cluster)
    if shifted is not None:
        shift_options.run_shift_bench(study, files, planned.groups, result, shifted, folder, as_json)
        return
    _hand_over(result, folder, as_json)


def _hand_over(result: BenchResult, folder: Path, as_json: bool) -> None:
    if as_json:
        show_json(result.model_dump(mode="json"))
        return
    _show(result)
    say(f"Everything is in {folder / 'bench.json'}, the tables and plots in {folder / 'bench.html'}")


def _check_cluster(study: Study) -> None:
    if study.settings.cluster.kind == "inline":
        raise SettingsError(
            "The settings name no cluster.",
            [("cluster.kind", "is inline")],
            "Add --set cluster.kind=local, or another.",
        )


def _methods(text: str | None) -> tuple[str, ...]:
    names = tuple(METHODS) if text is None else comma_separated(text)
    unknown = [(name, "is no method") for name in names if name not in METHODS]
    if unknown or not names:
        raise SettingsError("--methods cannot be read.", unknown, f"Use some of {', '.join(METHODS)}.")
    return names


def _shots(text: str) -> tuple[int | None, ...]:
    words = comma_separated(text)
    wrong = [(word, "is neither a number of patients from 1 nor all") for word in words if not _is_shots(word)]
    if wrong or not words:
        raise SettingsError("--shots cannot be read.", wrong, "Write them like 5,10,all.")
    return tuple(None if word == ALL_SHOTS else int(word) for word in words)


def _is_shots(word: str) -> bool:
    return word == ALL_SHOTS or (word.isascii() and word.isdecimal() and 0 < int(word) < 10**6)


def _rates(text: str | None) -> tuple[float, ...]:
    rates, wrong = [], []
    for word in comma_separated(text or ""):
        try:
            rates.append(float(word))
        except ValueError:
            wrong.append((word, "is no number"))
    if wrong or (text is not None and not rates):
        raise SettingsError("--rates cannot be read.", wrong, "Write them like 1e-4,1e-3.")
    return tuple(dict.fromkeys(rates))


def _limit(study: Study, memory: float | None, cluster: bool) -> float | None:
    """Return the bytes that a training step may take; the memory of workers is not known here."""
    from stages.device import pick_device
    from stages.train.trial import device_memory

    if memory is not None:
        return memory * 2**30
    return None if cluster else float(device_memory(pick_device(study.settings.compute.device)))


def _reference(named: str | None, methods: str | None, planned: Plan) -> str:
    """Return the reference: the one that was named, the first of the named methods, linear, or the first of all."""
    if not planned.methods:
        reasons = "\n".join(f"  {method}: {why}" for method, why in planned.left_out.items())
        raise TrainingError("No method can be trained.", reasons, "See what each needs: `fpt bench --plan`.")
    if named is not None:
        return named
    known = methods is None and DEFAULT_REFERENCE in planned.methods
    return DEFAULT_REFERENCE if known else planned.methods[0]


def _run(
    study: Study, files: StudyFiles, asked: Asked, planned: Plan, reference: str, folder: Path, cluster: bool
) -> BenchResult:
    """Train and evaluate everything, and write the result.

    Raises:
        TrainingError: No method finished.
    """
    from pipeline.bench_result import collect, write_result
    from pipeline.bench_runs import inline, run_groups
    from pipeline.sweep_jobs import note_use

    execute = inline
    if cluster:
        from pipeline.cluster.bench_groups import on_cluster

        execute = on_cluster
    note_use(study, files.receipt)
    failed = run_groups(study, files, planned.groups, execute)
    result = collect(study, files, planned, asked, reference, failed, folder)
    if not any(result.shots.values()):
        reasons = "\n".join(f"  {method}: {why}" for method, why in result.left_out.items())
        raise TrainingError("No method finished.", reasons, "Finished trainings are kept: run `fpt bench` again.")
    write_result(result, folder)
    return result


def _show(result: BenchResult) -> None:
    from stages.evaluate.bench_report import COLUMNS, cells, title_of

    shown = [*range(MAIN), COLUMNS.index("PME"), COLUMNS.index("rate")]
    for shots, rows in result.shots.items():
        table = [[method, *(cells(row)[at] for at in shown)] for method, row in rows.items()]
        compared = f"; difference to {result.reference} with 95% interval" if result.reference in rows else ""
        if table:
            show_table(f"{title_of(shots)}{compared}", ["method", *(COLUMNS[at] for at in shown)], table)
    _name_left_out(result.left_out)


def _name_left_out(left_out: Mapping[str, str]) -> None:
    if left_out:
        say(f"Left out: {counted(len(left_out), 'method')}")
    for method, why in left_out.items():
        say(f"  {method}: {why}")


def _show_plan(plan: BenchPlan, as_json: bool) -> None:
    if as_json:
        show_json(plan.model_dump(mode="json"))
        return
    rows = [
        [
            row.method,
            "-" if row.learnable is None else f"{row.learnable:,}",
            "-" if row.tensor_mib is None else f"{row.tensor_mib:,.1f}",
            str(row.runs),
            str(row.finished),
            str(row.together),
            "-" if row.seconds is None else duration(row.seconds),
            row.basis,
        ]
        for row in plan.methods
    ]
    limit = "" if plan.memory_gib is None else f" in {plan.memory_gib:,.1f} GiB"
    columns = ["method", "learnable", "MiB", "runs", "finished", "per pass", "time", "measured by"]
    if rows:
        show_table(f"What `fpt bench` would train{limit}", columns, rows)
    known = [row.seconds for row in plan.methods if row.seconds is not None]
    say(f"Estimated time in all: {duration(sum(known))}")
    _name_left_out(plan.left_out)
