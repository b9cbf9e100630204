"""The command line: one verb an arrow of the pipeline, and the one place where errors become words."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from pipeline.commands.cache import cache
from pipeline.commands.compare import compare
from pipeline.commands.cost import cost
from pipeline.commands.demo import demo
from pipeline.commands.doctor import doctor
from pipeline.commands.evaluate import evaluate
from pipeline.commands.extract import extract
from pipeline.commands.init import init
from pipeline.commands.lr_find import lr_find
from pipeline.commands.predict import predict
from pipeline.commands.prepare import prepare
from pipeline.commands.sweep import sweep
from pipeline.commands.train import train
from pipeline.console import say
from pipeline.interrupt import interrupted_message
from schemas.errors import FptError, PlatformError
from stages.ranks import Ranks

INTERRUPTED = 130
"""Exit code."""
TOGETHER = ("train",)
"""Verbs that several processes run together."""

app = typer.Typer(
    name="fpt",
    help="Pay for a large vision transformer once per image, then train side networks for nearly nothing.",
    epilog="--debug, anywhere on the line, shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for verb in (init, prepare, extract, train, sweep, lr_find, evaluate, compare, predict, cost, doctor):
    app.command()(verb)
app.add_typer(cache, name="cache")
app.add_typer(demo, name="demo")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("fpt"))
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    count = Ranks.of().count
    if count > 1 and context.invoked_subcommand not in TOGETHER:
        verb = context.invoked_subcommand
        raise PlatformError(
            f"{count} processes were started to run `fpt {verb}`, which one does.",
            "torchrun starts several; of all verbs only train makes use of them.",
            f"Run `fpt {verb}` without torchrun.",
        )


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that led to an error, or None."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 an error of this program, 2 an error that the user can mend, 130 interrupted.

    Args:
        arguments: Words after `fpt`; those of the process where None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here, so that it is understood before and after the verb and holds while the words are being read.
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        app(words, prog_name="fpt")
    except SystemExit as end:
        # Typer turns Ctrl-C into this exit code.
        if end.code == INTERRUPTED and (interrupt := _interrupt(end)) is not None:
            say(interrupted_message(words, interrupt))
        raise
    except FptError as error:
        if debug:
            traceback.print_exc()
        else:
            typer.echo(str(error), err=True)
        sys.exit(2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            lines = str(error).strip().splitlines()
            typer.echo(f"{type(error).__name__}: {lines[0] if lines else '(no message)'}", err=True)
            typer.echo("This is an error inside fpt. Repeat the command with --debug to see where.", err=True)
        sys.exit(1)
    sys.exit(0)
