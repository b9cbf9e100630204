"""`fpt predict`: classes of new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import say, show
from pipeline.options import PARAMS_FILE, Assignments, Params
from schemas.errors import DataError, UnreadableImagesError
from schemas.settings import OUTPUTS, LpmSettings
from schemas.text import counted


def predict(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", show_default=False)],
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model; else outputs/model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="CSV to write; else it is printed.", show_default=False)
    ] = None,
) -> None:
    """Classify new images. Features are computed in memory; the cache is not touched.

    A model alone is enough: without a params.yaml the LPM comes from the hub, or from --set lpm.weights=FILE. Images
    that cannot be used have an error in their row, and are listed at the end with exit code 2.
    """
    from pipeline.params import override, read_optional_params
    from pipeline.progress import ImageBar
    from schemas.parse import parse_settings
    from stages.device import set_up
    from stages.extract.work import batch_size
    from stages.predict import predict as run
    from stages.predict import predictions_csv, write_predictions_csv
    from stages.train.bundle import load_bundle

    settings = parse_settings(override(read_optional_params(params), assignments or []), source=params.name)
    root = params.absolute().parent
    device = set_up(settings.compute)
    bundle, files = model or root / OUTPUTS / "model", _files(images)
    # The model knows which LPM it needs, a folder only by its content; the settings say where it and its weights are.
    name = load_bundle(bundle).spec.features.lpm.name
    lpm = settings.lpm if name.startswith("local-dir:") else LpmSettings(name=name, weights=settings.lpm.weights)
    with ImageBar("Predicting") as bar:
        rows = run(
            bundle,
            files,
            lpm,
            root,
            device,
            batch_size=batch_size(settings.compute, device),
            data=settings.data,
            progress=bar,
        )
    if output is None:
        show(predictions_csv(rows).removesuffix("\n"))
    else:
        write_predictions_csv(rows, output)
        say(f"{counted(len(rows), 'image')}: {output}")
    failures = [(row.path, row.error) for row in rows if row.error is not None]
    if failures:
        raise UnreadableImagesError(failures, f"{len(rows) - len(failures)} of {len(rows)} images are predicted.")


def _files(images: list[Path]) -> list[Path]:
    """The images that were named, and those below the folders that were named."""
    from stages.prepare.scan import SUFFIXES

    files: list[Path] = []
    for image in images:
        if image.is_dir():
            found = sorted(path for path in image.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            if not found:
                raise DataError(f"{image} has no images.", f"Images end in {', '.join(sorted(SUFFIXES))}.")
            files += found
        else:
            files.append(image)
    return files
