"""Options of `fpt bench --shift`, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias, get_args

import typer

from pipeline.adapt_options import adapt_options
from pipeline.console import say, show_json, show_table
from pipeline.options import comma_separated
from schemas.errors import SettingsError
from schemas.shift import SITE, STRENGTHS, ShiftName
from schemas.test_time import ADAPTS

if TYPE_CHECKING:
    from pipeline.bench_plan import Group
    from pipeline.project import Study
    from pipeline.shift_bench import ShiftAsked
    from schemas.bench import BenchResult
    from schemas.shift import ShiftResult
    from stages.train.inputs import StudyFiles

NAMES = (*get_args(ShiftName), SITE)

Shift: TypeAlias = Annotated[
    bool, typer.Option("--shift", help="Then evaluate the runs on corrupted test images and held-out sites.")
]
Shifts: TypeAlias = Annotated[
    str | None,
    typer.Option("--shifts", metavar="NAME,NAME", help=f"Of {', '.join(NAMES)}; else all.", show_default=False),
]
Strengths: TypeAlias = Annotated[
    str, typer.Option("--strengths", metavar="N,N", help="Strengths of the corruptions, of 1 to 5.")
]
Adapts: TypeAlias = Annotated[
    str,
    typer.Option("--adapts", metavar="NAME,NAME", help=f"Adaptations next to none: of {', '.join(ADAPTS)}, or none."),
]


def shift_asked(shifts: str | None, strengths: str, adapts: str, batch: int, seed: int) -> ShiftAsked:
    """Parse the options.

    Raises:
        SettingsError: One of them cannot be read.
    """
    from pipeline.shift_bench import ShiftAsked

    names = NAMES if shifts is None else _some(shifts, NAMES, "--shifts")
    levels = _some(strengths, tuple(map(str, STRENGTHS)), "--strengths")
    chosen = [name for name in _some(adapts, (*ADAPTS, "none"), "--adapts") if name != "none"]
    options = tuple(adapt_options(name, batch, seed) for name in chosen)
    return ShiftAsked(names, tuple(sorted(map(int, levels))), (None, *options), seed, batch)


def _some(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    words = comma_separated(text)
    wrong = [(word, f"is not one of {', '.join(known)}") for word in words if word not in known]
    if wrong or not words:
        raise SettingsError(f"{option} cannot be read.", wrong, f"Use some of {', '.join(known)}.")
    return words


def show_shift_plan(groups: Sequence[Group], files: StudyFiles, asked: ShiftAsked) -> None:
    """Print what a shift bench would compute."""
    from pipeline.shift_bench import conditions_of, describe_shift

    conditions, left_out = conditions_of(files.manifest, asked)
    say(describe_shift(groups, conditions, asked, files.manifest))
    for name, why in left_out.items():
        say(f"  {name}: {why}")


def run_shift_bench(
    study: Study,
    files: StudyFiles,
    groups: Sequence[Group],
    trained: BenchResult,
    asked: ShiftAsked,
    folder: Path,
    as_json: bool,
) -> None:
    """Evaluate the trained runs of a bench on shifted images, write the result, and show it.

    Raises:
        FptError: As `pipeline.shift_bench.run_shift`.
    """
    from pipeline.shift_bench import collect_shift, conditions_of, run_shift, wanted_runs, write_shift

    show_shift_plan(groups, files, asked)
    conditions, sites = conditions_of(files.manifest, asked)
    wanted, left_out = wanted_runs(groups, asked)
    run_shift(study, files, wanted, conditions, asked)
    place = (trained.machine, trained.versions)
    result = collect_shift(wanted, conditions, asked, files.manifest, {**sites, **left_out}, place)
    write_shift(result, folder)
    if as_json:
        show_json(result.model_dump(mode="json"))
        return
    _show(result)
    say(f"Everything is in {folder / 'shift.json'}, the tables in {folder / 'shift.html'}")


def _show(result: ShiftResult) -> None:
    from stages.evaluate.bench_report import title_of
    from stages.evaluate.shift_table import SHOWN, columns_of, shots_of, table_of

    for shots in shots_of(result):
        for metric, name in SHOWN.items():
            table = table_of(result, shots, metric)
            show_table(f"{title_of(shots)}: {name}", ["method", "adaptation", *columns_of(result)], table)
    for name, why in result.left_out.items():
        say(f"  {name}: {why}")
