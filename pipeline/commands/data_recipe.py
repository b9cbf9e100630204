"""`fpt data recipe`: turn the original download of a published data set into a study."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.console import say, show_table
from pipeline.options import Assignments
from schemas.errors import ProjectError, SettingsError
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.recipes import Recipe
    from schemas.settings import Settings
    from stages.prepare.recipes.readers import Found


def recipe(
    name: Annotated[str | None, typer.Argument(help="Data set, as in --list.", show_default=False)] = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="Folder of the original download.", show_default=False)
    ] = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="Folder of the new study; by default, NAME.", show_default=False)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", help="Use the published few-shot lists of this many shots.", show_default=False),
    ] = None,
    draw: Annotated[int, typer.Option("--draw", help="Number of the few-shot draw, with --shots.")] = 1,
    assignments: Assignments = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the known data sets.")] = False,
) -> None:
    """Make a study of a published data set: labels, patients, splits and published settings.

    The download is neither changed nor copied; only images from .npz files are written as PNG files into the study.
    """
    from stages.prepare.recipes.study import read_download, write_labels

    if list_:
        _list()
        return
    chosen = _chosen(name)
    if source is None:
        raise SettingsError(
            "--source is missing.",
            [("--source", f"is the folder of the original download of {chosen.title}")],
            f"Download it from {chosen.source}",
        )
    folder = study or Path(chosen.name)
    settings = _settings(chosen, source, assignments or [], None if shots is None else (shots, draw))
    _check_apart(folder, source)
    if chosen.writes_images:
        say(f"Writing the images of {chosen.title} as PNG files into {folder}.")
    with _new_folder(folder):
        found = read_download(chosen, source, folder)
        write_labels(folder, chosen, found.images)
        _write_study(folder, settings)
    _report(chosen, found, folder)


def _list() -> None:
    from pipeline.recipe_tables import COLUMNS, recipe_rows

    show_table("Data sets of `fpt data recipe NAME --source DIR`", COLUMNS, recipe_rows(), words=True)


def _chosen(name: str | None) -> Recipe:
    from schemas.recipe_rows import RECIPES
    from stages.prepare.error_text import did_you_mean

    if name in RECIPES:
        return RECIPES[name]
    problem = "is missing" if name is None else f"is not known{did_you_mean(name, RECIPES)}"
    raise SettingsError(
        "No such recipe." if name else "Which data set?",
        [("NAME", f"{problem}; known are {', '.join(RECIPES)}")],
        "For a table: `fpt data recipe --list`. For other data: `fpt init`",
    )


def _settings(chosen: Recipe, source: Path, assignments: list[str], few: tuple[int, int] | None) -> Settings:
    from pipeline.params import override
    from schemas.parse import parse_settings
    from stages.prepare.recipes.study import data_settings, find_lists

    published = [f"{key}={value}" for key, value in chosen.settings.items()]
    raw: dict[str, Any] = {"data": data_settings(chosen, source)}
    if few is not None:
        raw["data"]["split_files"] = find_lists(chosen, source, *few)
    return parse_settings(override(override(raw, published), assignments), source=f"fpt data recipe {chosen.name}")


def _check_apart(folder: Path, source: Path) -> None:
    """Refuse a study inside of the download, in which nothing is written.

    Raises:
        ProjectError: It would be inside.
    """
    inner, outer = folder.expanduser().resolve(), source.expanduser().resolve()
    if inner == outer or outer in inner.parents:
        raise ProjectError(
            f"The study {folder} would be inside of the download {source}.",
            "A recipe leaves downloads as they are.",
            "Start it in another folder, or choose one with --study.",
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Refuse a folder that contains anything; remove all that was written into it if the block fails."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProjectError(
            f"{folder} is there already, and is not an empty folder.",
            "A recipe makes a new study and overwrites nothing.",
            "Choose another one with --study.",
        )
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if existed else ():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_study(folder: Path, settings: Settings) -> None:
    from pipeline.scaffold import check_inputs, initialise, write_study

    for note in check_inputs(settings.data, folder):
        say(note)
    initialise(folder, write_study(folder, settings))


def _report(chosen: Recipe, found: Found, folder: Path) -> None:
    """Print what was found, and how it differs from what was published."""
    from schemas.manifest import SPLITS
    from stages.prepare.recipes.counts import count_images, differences

    counts = count_images(found.images, chosen.task)
    splits = [split for split in ("", *SPLITS) if any(split == one for one, _ in counts)]
    rows = [
        [label or "all", *(f"{counts.get((split, label), 0):,}" for split in splits)] for label in (*chosen.classes, "")
    ]
    show_table(f"{chosen.title}: images", ["class", *(split or "images" for split in splits)], rows)
    if chosen.group:
        groups = {image.group for image in found.images if image.group}
        say(f"{counted(len(groups), chosen.group)}: {chosen.patients}.")
    else:
        say(f"Patients: {chosen.patients}.")
    for reason, number in sorted(found.left_out.items()):
        say(f"{counted(number, 'image')} left out: {reason}.")
    for line in differences(chosen, counts):
        say(f"Warning: {line}.")
    if not chosen.published:
        say("The published counts are not verified, so that the found ones were compared with nothing.")
    say(f"Created the study {folder}. Its settings: {folder / 'params.yaml'}\nNext:")
    if folder.resolve() != Path.cwd():
        say(f"  cd {shlex.quote(str(folder))}")
    say("  dvc repro                             # from images to a tested classifier")
