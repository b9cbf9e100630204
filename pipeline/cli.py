"""The command line: one verb an arrow of the pipeline, and the one place where errors become words."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

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
from pipeline.console import complain, make_encodable, notices_to, print_notice, say
from pipeline.interrupt import interrupted_message
from schemas.errors import FptError, PlatformError, StorageError
from schemas.urls import masked, secrets_in
from schemas.version import __version__
from stages.ranks import Ranks

INTERRUPTED = 130
"""Exit code."""
TOGETHER = ("train",)
"""Verbs that several processes run together."""

USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's `UsageError`: newer versions of typer contain click under a private name."""


class _InterruptedError(Exception):
    """Ctrl-C within a verb; the cause is the KeyboardInterrupt, which typer would turn into a bare exit code."""


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error


app = typer.Typer(
    name="fpt",
    cls=_Verbs,
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
        typer.echo(__version__)
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


def _masked(text: str, words: Sequence[str]) -> str:
    """Hide what is secret in URLs, and the passwords of URLs on the command line wherever libraries quote them."""
    return masked(text, secrets_in(" ".join(words)))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 an error of this program, 2 an error that the user can mend, 130 interrupted.

    Args:
        arguments: Words after `fpt`; those of the process where None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here, so that it is understood before and after the verb and holds while the words are being read.
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    make_encodable()
    try:
        # Without its own printing of errors, which would pass control characters of a word on to the terminal.
        with notices_to(print_notice):
            code = app(words, prog_name="fpt", standalone_mode=False)
        if code == INTERRUPTED:  # What typer makes of Ctrl-C while the words are being read.
            raise KeyboardInterrupt
    except (KeyboardInterrupt, _InterruptedError) as error:
        cause = error.__cause__ if isinstance(error, _InterruptedError) and error.__cause__ is not None else error
        say(_masked(interrupted_message(words, cause), words))
        sys.exit(INTERRUPTED)
    except Exception as error:
        explained = _explained(error)
        if message := traceback.format_exc() if debug else _internal(error) if explained is None else str(explained):
            complain(_masked(message.rstrip(), words))
        sys.exit(1 if explained is None else 2)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Exception) -> FptError | None:
    """The error as one that the user can fix, or None for a fault of this program."""
    if isinstance(error, FptError):
        return error
    if isinstance(error, USAGE_ERROR):
        context = error.ctx
        if context is None:
            return FptError(error.format_message())
        repair = f"`{context.command_path} --help` lists what is possible."
        if not (message := error.format_message()):
            return FptError("")  # no words after `fpt` or a group of verbs: the help is printed already
        return FptError(f"Error: {message}", context.get_usage(), repair)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        # Every path comes from the user: as an argument, as a setting, or as the folder of the study.
        return StorageError(
            f"{error.filename}: {error.strerror}.",
            "The system refuses this path.",
            "Correct the path, or repeat the command with --debug to see where it is used.",
        )
    return None


def _internal(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0] if lines else '(no message)'}\n"
        "This is an error inside fpt. Repeat the command with --debug to see where."
    )
