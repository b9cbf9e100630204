"""`fpt init`: a study directory for a folder of images."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.console import say
from pipeline.options import Assignments
from schemas.errors import DataError, SettingsError
from schemas.settings import DataSettings, Settings

_KEY = re.compile(r"\bdata\.(images|labels|path_column|label_column|group_column|split_column)\b")
"""Keys that have an option of their own."""
_COLUMN = re.compile(r"\b(path_column|label_column|group_column|split_column)\b")


def init(
    study: Annotated[Path, typer.Argument(help="Folder of the new study.", show_default=False)],
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.", show_default=False)],
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="CSV with a row per image; without it, class folders.", show_default=False),
    ] = None,
    path_column: Annotated[str, typer.Option("--path-column", help="Column with the image's path.")] = "path",
    label_column: Annotated[str, typer.Option("--label-column", help="Column with the label.")] = "label",
    group_column: Annotated[
        str, typer.Option("--group-column", help="Column with the patient; none: each image by itself.")
    ] = "auto",
    split_column: Annotated[
        str, typer.Option("--split-column", help="Column with train, val or test; none: splits are drawn.")
    ] = "auto",
    assignments: Assignments = None,
) -> None:
    """Make a study directory: params.yaml, dvc.yaml, Git and DVC ready to go. Overwrites nothing."""
    from pipeline.scaffold import initialise, undone_on_failure, write_study

    # Absolute, because an experiment that DVC runs in a temporary copy of the repository has tracked files only.
    data = {
        "images": str(images.expanduser().resolve()),
        "labels": None if labels is None else str(labels.expanduser().resolve()),
        "path_column": path_column,
        "label_column": label_column,
        "group_column": group_column,
        "split_column": split_column,
    }
    settings = _settings({"data": data}, assignments or [])
    notes = _check(settings.data, study)
    with undone_on_failure(study):
        added = initialise(study, write_study(study, settings))
    parts = " and ".join(added.parts)
    say(f"{study} is a study{f', with {parts}' if parts else ''}. Its settings: {study / 'params.yaml'}")
    for note in notes:
        say(note)
    say("Next:")
    if study.resolve() != Path.cwd():
        say(f"  cd {shlex.quote(str(study))}")
    say("  dvc repro                             # images in, a tested classifier out")
    if added.unstaged:
        say(f"  git add {shlex.join(added.unstaged)}   # nothing is staged in your repository")
    say('  git commit -m "A new study"           # before the first `dvc exp run`')


def _settings(raw: dict[str, Any], assignments: list[str]) -> Settings:
    from pipeline.params import override
    from schemas.parse import parse_settings

    tree = override(raw, assignments)
    try:
        return parse_settings(tree)
    except SettingsError as error:
        problems = [
            (_as_options(path) if _KEY.fullmatch(path) else f"--set {path}", _COLUMN.sub(_option, message))
            for path, message in error.problems
        ]
        raise SettingsError(
            "The options of `fpt init` do not make valid settings.",
            problems,
            "Correct them and repeat `fpt init`; nothing was written.",
        ) from None


def _as_options(text: str) -> str:
    """A message about `params.yaml`, which does not exist yet, with the options of `fpt init` in place of its keys."""
    text = text.replace("the folder of params.yaml", "the working directory").replace(" in params.yaml", "")
    return _KEY.sub(_option, text)


def _option(key: re.Match[str]) -> str:
    return f"--{key[1].replace('_', '-')}"


def _check(data: DataSettings, study: Path) -> list[str]:
    """Check images and labels; errors name options instead of keys.

    Returns:
        What was chosen by header or layout, for people.
    """
    from pipeline.scaffold import check_inputs

    try:
        return check_inputs(data, study)
    except DataError as error:
        repair = f"{_as_options(error.repair)}\nThen repeat `fpt init`; nothing was written."
        raise DataError(error.state, _as_options(error.cause), repair) from None
