"""`fpt data`: check and repair a data set before anything is computed."""

from __future__ import annotations

from collections import Counter

import typer

from pipeline.console import say_next, show_table
from pipeline.options import PARAMS_FILE, Assignments, Params
from schemas.tasks import names_in
from schemas.text import counted

data = typer.Typer(help="The data set: what it contains, and what is wrong with it.", no_args_is_help=True)


@data.callback()
def _group() -> None:
    """Keep the group a group while it has a single command."""


@data.command()
def check(params: Params = PARAMS_FILE, assignments: Assignments = None) -> None:
    """Count images and patients by class. Nothing is written."""
    from pipeline.params import load_settings
    from stages.prepare.dataset_listing import read_listing

    settings = load_settings(params, assignments or []).data
    listing = read_listing(settings, params.absolute().parent)
    counts = Counter(name for item in listing.items for name in names_in(item.label, settings.task))
    rows = [[name, f"{number:,}"] for name, number in sorted(counts.items())]
    show_table(counted(len(listing.items), "image"), ["class", "images"], rows)
    say_next("fpt prepare")
