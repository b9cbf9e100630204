"""`fpt init`: a study directory for a folder of images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import say
from pipeline.options import Assignments
from schemas.errors import DataError
from schemas.settings import DataSettings


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
    from pipeline.params import override
    from pipeline.scaffold import initialise, write_study
    from schemas.parse import parse_settings

    # Absolute, because an experiment that DVC runs in a temporary copy of the repository has tracked files only.
    data = {
        "images": str(images.expanduser().resolve()),
        "labels": None if labels is None else str(labels.expanduser().resolve()),
        "path_column": path_column,
        "label_column": label_column,
        "group_column": group_column,
        "split_column": split_column,
    }
    settings = parse_settings(override({"data": data}, assignments or []), source="The new params.yaml")
    notes = _check(settings.data, study)
    written = write_study(study, settings)
    added = initialise(study, written)
    say(f"{study} is a study{f', with {added}' if added else ''}. Its settings: {study / 'params.yaml'}")
    for note in notes:
        say(note)
    say("Next:")
    if study.resolve() != Path.cwd():
        say(f"  cd {shlex.quote(str(study))}")
    say("  dvc repro                             # images in, a tested classifier out")
    say('  git commit -m "A new study"           # before the first `dvc exp run`')


def _check(data: DataSettings, study: Path) -> list[str]:
    """Refuse images and labels that `fpt prepare` would refuse, as far as this can be seen without opening an image.

    Returns:
        What was chosen by header or layout, for people.
    """
    from stages.prepare.items import check_listing, read_listing
    from stages.prepare.table import check_files

    try:
        listing = read_listing(data, study)
        if data.on_error == "fail":
            check_listing(listing)
            if data.labels is not None:
                check_files(listing.items, listing.images, data.labels)
        return listing.notes
    except DataError as error:
        repair = "Then repeat `fpt init`; nothing was written. Its options name the images, the CSV and its columns."
        raise DataError(error.state, error.cause, f"{error.repair}\n{repair}") from None
