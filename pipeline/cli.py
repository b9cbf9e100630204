"""The command line: one verb per arrow of the pipeline, and the conversion of exceptions to messages."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pipeline.commands.bench import bench
from pipeline.commands.cache import cache
from pipeline.commands.compare import compare
from pipeline.commands.cost import cost
from pipeline.commands.data import data
from pipeline.commands.demo import demo
from pipeline.commands.doctor import doctor
from pipeline.commands.evaluate import evaluate
from pipeline.commands.extract import extract
from pipeline.commands.federate import federate
from pipeline.commands.init import init
from pipeline.commands.lr_find import lr_find
from pipeline.commands.predict import predict
from pipeline.commands.prepare import prepare
from pipeline.commands.sweep import sweep
from pipeline.commands.train import train
from pipeline.console import make_encodable, notices_to, print_error, print_notice, say
from pipeline.interrupt import interrupted_message
from pipeline.plugins import load_plugins
from schemas.errors import FptError, PlatformError, StorageError
from schemas.urls import masked, secrets_in
from schemas.version import __version__
from stages.ranks import Ranks

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
DISTRIBUTED = ("train",)
"""Verbs that support several processes."""

USAGE_ERROR: Any = typer.BadParameter.__base__
"""The `UsageError` of click, which newer versions of typer bundle under a private name."""


class _InterruptedError(Exception):
    """Raised on Ctrl-C within a verb, because typer would turn the KeyboardInterrupt, its cause, into an exit code."""


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error


app = typer.Typer(
    name="fpt",
    cls=_Verbs,
    help="Run a large vision transformer once per image, cache its features, and train small classifiers on them.",
    epilog="--debug, anywhere on the line, shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for verb in (init, prepare, extract, train, federate, sweep, bench, lr_find, evaluate, compare, predict, cost, doctor):
    app.command()(verb)
app.add_typer(cache, name="cache")
app.add_typer(data, name="data")
app.add_typer(demo, name="demo")


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE",
            help="Python file with methods of your own; also in FPT_PLUGINS (docs/extending.md).",
            show_default=False,
        ),
    ] = None,
) -> None:
    load_plugins(plugin or ())
    count = Ranks.of().count
    if count > 1 and context.invoked_subcommand not in DISTRIBUTED:
        verb = context.invoked_subcommand
        raise PlatformError(
            f"{count} processes were started for `fpt {verb}`, which needs only one.",
            "torchrun starts several processes, which only `fpt train` supports.",
            f"Run `fpt {verb}` without torchrun.",
        )


def _masked(text: str, words: Sequence[str]) -> str:
    """Mask secrets in URLs, and passwords from URLs on the command line that libraries quote in their errors."""
    return masked(text, secrets_in(" ".join(words)))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 success, 1 internal error, 2 error that the user can fix, 130 interrupted.

    Args:
        arguments: Arguments after `fpt`, or None for those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Removed here, so that it works before and after the verb, and already while the arguments are parsed.
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    make_encodable()
    try:
        # Not standalone, because click would print errors without escaping control characters.
        with notices_to(print_notice):
            code = app(words, prog_name="fpt", standalone_mode=False)
        if code == INTERRUPTED:  # typer returns this after Ctrl-C while it parses arguments.
            raise KeyboardInterrupt
    except (KeyboardInterrupt, _InterruptedError) as error:
        cause = error.__cause__ if isinstance(error, _InterruptedError) and error.__cause__ is not None else error
        say(_masked(interrupted_message(words, cause), words))
        sys.exit(INTERRUPTED)
    except Exception as error:
        explained = _explained(error)
        if message := traceback.format_exc() if debug else _internal(error) if explained is None else str(explained):
            print_error(_masked(message.rstrip(), words))
        sys.exit(1 if explained is None else 2)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Exception) -> FptError | None:
    """Convert an exception to an error that the user can fix, or return None for an internal error."""
    if isinstance(error, FptError):
        return error
    if isinstance(error, USAGE_ERROR):
        context = error.ctx
        if context is None:
            return FptError(error.format_message())
        repair = f"For all options: `{context.command_path} --help`"
        if not (message := error.format_message()):
            return FptError("")  # without a verb, the help has already been printed
        return FptError(f"Error: {message}", context.get_usage(), repair)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        # All paths come from the user: as arguments, settings, or the folder of the study.
        return StorageError(
            f"{error.filename}: {error.strerror}.",
            "The operating system rejects this path.",
            "Correct the path, or repeat the command with --debug to see where it is used.",
        )
    return None


def _internal(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0] if lines else '(no message)'}\n"
        "This is an error inside fpt. Repeat the command with --debug to see where."
    )
