"""`fpt prepare`: check images and labels, and write the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import say, say_next, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.data_settings import REST, DataSettings
from schemas.manifest import SPLITS, PrepareResult
from schemas.text import counted


def prepare(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw all splits again; by default, known images keep theirs.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Read every image again; by default, only new and changed files.")
    ] = False,
    write_split: Annotated[
        Path | None,
        typer.Option(
            "--write-split",
            metavar="FILE.csv",
            help="Also write path, label, patient and split as a table for data.labels.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check images and labels, and assign every image to train, val or test.

    Images keep their split when others are added or removed. What was read of a file is remembered in .fpt/images.
    """
    from pipeline.api import prepare as run
    from pipeline.progress import ImageBar
    from pipeline.project import open_study, remind_to_watch
    from stages.prepare import QUARANTINE_FILE

    study = open_study(params, assignments or [])
    data = study.settings.data
    if data.labels_file is not None:
        remind_to_watch(study, "data.labels", data.labels_file)
    for split, name in (data.split_files or {}).items():
        if name != REST:
            remind_to_watch(study, f"data.split_files.{split}", name)
    with ImageBar("Reading images") as bar:
        result = run(study, redraw=redraw, full=full, write_split=write_split, progress=bar)
    if as_json:
        show_json(result.model_dump(mode="json"))
        return
    _show(result)
    if result.quarantined:
        say(f"Set aside {counted(result.quarantined, 'image')}: {study.manifest_folder / QUARANTINE_FILE}")
    if result.warned:
        say(f"{counted(result.warned, 'image')} with corrupt data used (data.on_warning: accept).")
    if write_split is not None:
        _show_written(write_split, data)
    say_next("fpt extract")


def _show(result: PrepareResult) -> None:
    for note in result.notes:
        say(note)
    classes = list(dict.fromkeys(name for counts in result.counts.values() for name in counts))
    rows = [[name, *(str(result.counts.get(split, {}).get(name, 0)) for split in SPLITS)] for name in classes]
    totals = [str(result.split_images.get(split, 0)) for split in SPLITS]
    show_table(_title(result), ["class", *SPLITS], [*rows, ["all", *totals]])
    if result.known:
        moved = sum(result.moved.values())
        ways = ", ".join(f"{number:,} {way}" for way, number in result.moved.items())
        changed = f"{moved:,} changed it ({ways})" if moved else "none changed it"
        kept = counted(result.known - moved, "image")
        say(f"{kept} kept their split, {changed}, {result.images - result.known:,} new.")
    for line in result.changes:
        say(line)


def _title(result: PrepareResult) -> str:
    copies = counted(result.duplicates, "duplicate")
    if result.near:
        copies += f", {counted(result.near, 'near-duplicate')}"
    if result.unit is None:
        return f"{counted(result.images, 'image')}, {copies}"
    unit = result.unit.removesuffix("s") if result.groups == 1 else result.unit
    grouped = f"{counted(result.images - result.singles, 'image')} of {result.groups:,} {unit}"
    without_group = f", {result.singles:,} without a {result.unit.removesuffix('s')}" if result.singles else ""
    return f"{grouped}{without_group}, {copies}"


def _show_written(path: Path, data: DataSettings) -> None:
    others = ["data.split_column: auto"] if data.split_column is None else []
    others += [f"data.{name}: null" for name in ("split_files", "tag_columns") if getattr(data, name) is not None]
    also = "".join(f" and {setting}" for setting in others)
    say(
        f"The splits are in {path}. To use them, set data.labels: {path.resolve()}{also} in params.yaml; "
        "rows added without a split get one by drawing."
    )
