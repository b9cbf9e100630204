"""`fpt prepare`: check images and labels, and write the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, say_next, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import FptError
from schemas.manifest import SPLITS, PrepareResult
from schemas.settings import DataSettings, Settings
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study


def prepare(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw all splits again; by default, known images keep theirs.")
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

    Images keep their split when others are added or removed.
    """
    from pipeline.params import write_settings
    from pipeline.progress import ImageBar
    from pipeline.project import open_study, remind_to_watch
    from stages.manifest import read_manifest
    from stages.prepare import MANIFEST_FILE, QUARANTINE_FILE
    from stages.prepare import prepare as run
    from stages.prepare.exports import check_free, write_splits

    study = open_study(params, assignments or [])
    data = study.settings.data
    if data.labels is not None:
        remind_to_watch(study, "data.labels", data.labels)
    if write_split is not None:
        check_free(write_split)
    output = study.manifest_folder
    _adopt_splits(study)
    with ImageBar("Reading images") as bar:
        result = run(data, study.root, output, bar, study.splits, redraw)
    write_settings(_resolved(study.settings, result), output)
    if write_split is not None:
        write_splits(read_manifest(output / MANIFEST_FILE), result, data, write_split)
    if as_json:
        show_json(result.model_dump(mode="json"))
        return
    _show(result)
    if result.quarantined:
        say(f"Set aside {counted(result.quarantined, 'image')}: {output / QUARANTINE_FILE}")
    if result.warned:
        say(f"{counted(result.warned, 'image')} with corrupt data used (data.on_warning: accept).")
    if write_split is not None:
        _show_written(write_split, data)
    say_next("fpt extract")


def _adopt_splits(study: Study) -> None:
    """Record the splits of an existing manifest, so that its images keep them, if the history of its draw is missing.

    This happens if the manifest was pulled with DVC, or written by a version without history.
    """
    from pipeline.params import read_params
    from schemas.parse import parse_settings
    from stages.manifest import read_manifest
    from stages.prepare import MANIFEST_FILE
    from stages.prepare.split_history import KnownSplits, is_known, same_draw, write_known

    data, file = study.settings.data, study.manifest_folder / MANIFEST_FILE
    if is_known(study.splits, data) or not file.exists():
        return
    try:
        drawn_with = parse_settings(read_params(file.with_name("settings.yaml"))).data
        manifest = read_manifest(file)
    except FptError:
        # Without its settings, or if it is damaged, it cannot be used, and `prepare` replaces it.
        return
    if same_draw(drawn_with, data):
        write_known(study.splits, data, KnownSplits().with_manifest(manifest), manifest)


def _resolved(settings: Settings, result: PrepareResult) -> Settings:
    """Replace "auto" in the settings by the chosen columns."""
    columns = {"group_column": result.group_column, "split_column": result.split_column}
    return settings.model_copy(update={"data": settings.data.model_copy(update=columns)})


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


def _title(result: PrepareResult) -> str:
    copies = counted(result.duplicates, "duplicate")
    if result.unit is None:
        return f"{counted(result.images, 'image')}, {copies}"
    unit = result.unit.removesuffix("s") if result.groups == 1 else result.unit
    grouped = f"{counted(result.images - result.singles, 'image')} of {result.groups:,} {unit}"
    without_group = f", {result.singles:,} without a {result.unit.removesuffix('s')}" if result.singles else ""
    return f"{grouped}{without_group}, {copies}"


def _show_written(path: Path, data: DataSettings) -> None:
    null = " and data.split_column: auto" if data.split_column is None else ""
    say(
        f"The splits are in {path}. To use them, set data.labels: {path.resolve()}{null} in params.yaml; "
        "rows added without a split get one by drawing."
    )
