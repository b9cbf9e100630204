"""`fpt data repair`: write a table without the images that leak between splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, say_next, show, show_json
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.data_check import Repair


def repair(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE.csv",
            help="The new table; by default next to data.labels, as NAME.repaired.csv.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy of the table without the images of train and val that leak into test (or train into val).

    A second file lists what was left out and why. The table of the study is never changed.
    """
    from pipeline.params import load_settings
    from pipeline.progress import ImageBar
    from pipeline.project import index_folder, private_folder
    from stages.data_check.check import read_data
    from stages.data_check.repair import default_output, plan_repair, write_repair
    from stages.prepare.exports import check_free

    settings, root = load_settings(params, assignments or []), params.absolute().parent
    data = settings.data
    table = output or default_output(data, root)
    report = table.with_suffix(".report.csv")
    for path in (table, report):
        check_free(path)
    with ImageBar("Reading images") as bar:
        rendering = settings.features.rendering
        index, private = index_folder(root), private_folder(root)
        read = read_data(data, root, progress=bar, index=index, rendering=rendering, private=private)
    result = plan_repair(read)
    if result.dropped:
        write_repair(result, read, root, table, report)
    if as_json:
        show_json(result.model_dump(mode="json"))
        return
    _show(result)
    if result.dropped:
        say(f"The new table: {table}, what it leaves out: {report}")
        say(f"To use it, set data.labels: {table.resolve()} in params.yaml.")
        say_next("fpt prepare")


def _show(result: Repair) -> None:
    if not result.dropped:
        show("No leaks between the splits: nothing was written.")
    ways = Counter(f"{image.split} (kept in {image.kept})" for image in result.dropped)
    for way, number in sorted(ways.items()):
        show(f"{counted(number, 'image')} left out of {way}.")
    for copies in result.conflicts:
        names = " = ".join(f"{path} ({label})" for path, label in zip(copies.paths, copies.labels, strict=True))
        show(f"Not repaired, because a person has to decide which label is right: {names}")
    for gap in result.missing:
        show(f"In the new table there is {gap}.")
