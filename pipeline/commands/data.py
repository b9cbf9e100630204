"""`fpt data`: check and repair a data set before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.data_recipe import recipe
from pipeline.commands.data_repair import repair
from pipeline.console import say, say_next, show, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import FptError
from schemas.settings import OUTPUTS

if TYPE_CHECKING:
    from schemas.data_check import Copies, DataCheck
    from schemas.manifest import Manifest
    from stages.data_check.check import ReadData

data = typer.Typer(help="The data set: what it contains, and what is wrong with it.", no_args_is_help=True)
data.command()(recipe)
data.command()(repair)

SHOWN = 10
"""Cases of a finding that are printed; the page and --json have all."""


@data.command()
def check(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="HTML page; outputs/data_check.html.", show_default=False),
    ] = None,
    no_pixels: Annotated[bool, typer.Option("--no-pixels", help="Leave the images out of the page.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at the data before anything is computed: counts, defects, copies, leaks, suspected shortcuts.

    Writes a page with the images of each class. Nothing is refused, and no file of the data set changes.
    """
    from pipeline.params import load_settings
    from pipeline.progress import ImageBar
    from pipeline.project import index_folder, manifest_file, private_folder
    from stages.data_check.check import check_data, read_data
    from stages.data_check.page import render_check
    from stages.files import atomic_write

    # Without the LPM, whose weights may not be there yet.
    settings, root = load_settings(params, assignments or []), params.absolute().parent
    page = output or root / OUTPUTS / "data_check.html"
    with ImageBar("Reading images") as bar:
        manifest = _manifest(manifest_file(root, settings.data))
        rendering, private = settings.features.rendering, private_folder(root)
        read = read_data(settings.data, root, manifest, bar, index_folder(root), rendering, private)
    result = check_data(read, settings.features.image_size)
    result = result.model_copy(update={"similar_features": _similar_features(read, root)})
    atomic_write(page, render_check(result, read, pixels=not no_pixels).encode())
    if as_json:
        show_json(result.model_dump(mode="json"))
        return
    _show(result)
    say(f"Page: {page}")
    say_next("fpt prepare")


def _manifest(file: Path) -> Manifest | None:
    """Return the manifest of the study, or None before `fpt prepare`."""
    from stages.manifest import read_manifest

    return read_manifest(file) if file.exists() else None


def _similar_features(read: ReadData, root: Path) -> tuple[Copies, ...] | None:
    """Compare the cached features of the images, after an extraction."""
    from pipeline.project import cache_root
    from stages.data_check.similar_features import find_similar_features
    from stages.store.extraction_receipt import read_extraction_receipt

    receipt = root / OUTPUTS / "features" / "receipt.json"
    if not receipt.exists():
        return None
    try:
        return find_similar_features(read, cache_root(root), read_extraction_receipt(receipt))
    except FptError as error:
        say(f"The cached features are not compared: {error.state}")
        return None


def _show(result: DataCheck) -> None:
    from stages.data_check.wording import count_tables, findings, headline

    show(headline(result))
    for table in count_tables(result):
        # A column with a single value tells nothing.
        if len(table.rows) > 1 or table.title == "Classes":
            show_table(table.title, table.columns, table.rows)
    for finding in findings(result):
        show(f"{finding.title}. {finding.meaning}")
        for line in finding.lines[:SHOWN]:
            show(f"  {line}")
        if len(finding.lines) > SHOWN:
            show(f"  ... and {len(finding.lines) - SHOWN:,} more")
