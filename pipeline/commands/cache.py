"""`fpt cache`: where the features lie."""

from __future__ import annotations

import typer

from pipeline.console import show
from pipeline.options import PARAMS_FILE, Params

cache = typer.Typer(help="The cache of features.", no_args_is_help=True)


@cache.command()
def path(params: Params = PARAMS_FILE) -> None:
    """Print the folder of the feature stores: FPT_CACHE_DIR, else .fpt/cache of the study."""
    from pipeline.project import cache_root

    show(str(cache_root(params.absolute().parent)))
