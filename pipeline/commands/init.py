"""`fpt init`: create a study directory for a folder of images."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from pipeline.console import say
from pipeline.options import Assignments
from schemas.data_settings import DataSettings
from schemas.errors import DataError, SettingsError
from schemas.modalities import MODALITIES
from schemas.settings import Settings

_KEY = re.compile(r"\bdata\.(images|labels|path_column|label_column|group_column|split_column)\b")
"""Settings with an option of their own."""
_SETTING = re.compile(r"(?:\bset )?\b(data\.\w+): ([\w.]+|\[[^\]]*\]|\{[^}]*\})")
"""A setting with a value, as messages write it for params.yaml."""
_COLUMN = re.compile(r"\b(path_column|label_column|group_column|split_column)\b")
Labels: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="CSV with a row per image, or tags (DICOM headers); else class folders.", show_default=False
    ),
]


def init(
    study: Annotated[Path, typer.Argument(help="Folder of the new study.", show_default=False)],
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.", show_default=False)],
    labels: Labels = None,
    path_column: Annotated[str, typer.Option("--path-column", help="Column with the image's path.")] = "path",
    label_column: Annotated[str, typer.Option("--label-column", help="Column with the label.")] = "label",
    group_column: Annotated[
        str, typer.Option("--group-column", help="Column with the patient; none: independent images.")
    ] = "auto",
    split_column: Annotated[
        str, typer.Option("--split-column", help="Column with train, val or test; none: draw splits.")
    ] = "auto",
    modality: Annotated[
        str | None,
        typer.Option(
            "--modality",
            metavar="NAME",
            help=f"Propose LPM, resize rule and window for such images: {', '.join(MODALITIES)}.",
            show_default=False,
        ),
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Create a study directory with params.yaml, dvc.yaml, Git and DVC. Overwrites nothing."""
    from pipeline.proposals import find_modality, notes_on, propose
    from pipeline.scaffold import initialise, labels_setting, undone_on_failure, write_study

    # Absolute, because DVC runs experiments in a temporary copy of the repository that has only tracked files.
    data = {
        "images": str(images.expanduser().resolve()),
        "labels": labels_setting(labels),
        "path_column": path_column,
        "label_column": label_column,
        "group_column": group_column,
        "split_column": split_column,
    }
    proposed = find_modality(modality)
    settings = _settings(propose({"data": data}, proposed), assignments or [])
    notes = _check(settings.data, study)
    with undone_on_failure(study):
        added = initialise(study, write_study(study, settings, notes=notes_on(proposed)))
    created = " and ".join(added.created)
    say(f"Created the study {study}{f', with {created}' if created else ''}. Its settings: {study / 'params.yaml'}")
    for note in notes:
        say(note)
    if proposed is not None:
        values = ", ".join(f"{key}: {value}" for key, value in proposed.settings.items())
        say(f"Proposed for {proposed.title}: {values}. What is known of them: the first lines of params.yaml")
    say("Next:")
    if study.resolve() != Path.cwd():
        say(f"  cd {shlex.quote(str(study))}")
    say("  dvc repro                             # from images to a tested classifier")
    if added.unstaged:
        say(f"  git add {shlex.join(added.unstaged)}   # not staged yet in your repository")
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
            "The options of `fpt init` are not valid.",
            problems,
            "Correct them and repeat `fpt init`; nothing was written.",
        ) from None


def _as_options(text: str) -> str:
    """Replace keys of `params.yaml`, which does not exist yet, by options of `fpt init` in a message."""
    text = text.replace("the folder of params.yaml", "the working directory").replace(" in params.yaml", "")
    # The options of their own come first: what is left has none.
    return _SETTING.sub(_as_set, _KEY.sub(_option, text))


def _as_set(setting: re.Match[str]) -> str:
    """Return the option for a setting and its value, quoted for a shell."""
    return f"--set {shlex.quote(f'{setting[1]}={setting[2]}')}"


def _option(key: re.Match[str]) -> str:
    return f"--{key[1].replace('_', '-')}"


def _check(data: DataSettings, study: Path) -> list[str]:
    """Check images and labels; errors name options instead of keys.

    Returns:
        Choices made from the header or the layout, as lines for the user.
    """
    from pipeline.scaffold import check_inputs

    try:
        return check_inputs(data, study)
    except DataError as error:
        repair = f"{_as_options(error.repair)}\nThen repeat `fpt init`; nothing was written."
        raise DataError(error.state, _as_options(error.cause), repair) from None
