"""`fpt predict`: classes of new images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, show
from pipeline.options import PARAMS_FILE, Assignments, Params
from schemas.errors import SettingsError, UnreadableImagesError
from schemas.settings import OUTPUTS
from schemas.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.results import Prediction


def predict(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders, patterns ('images/*.png'), lists (@list.txt) or tables with paths (.csv).",
            show_default=False,
        ),
    ] = None,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled",
            help="Predict the images of the study that have no label (data.unlabelled: allow), from cached features.",
        ),
    ] = False,
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model; else outputs/model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Table to write: .csv, .tsv, .parquet or .xlsx; else CSV is printed.", show_default=False
        ),
    ] = None,
) -> None:
    """Classify new images. Features are computed in memory; the cache is not touched.

    The model folder is enough: without a params.yaml the LPM comes from the hub, or from --set lpm.weights=FILE. Images
    that cannot be used have an error in their row, and are listed at the end with exit code 2.
    """
    from pipeline.loaded_model import load_with
    from pipeline.params import override, read_optional_params
    from pipeline.progress import ImageBar
    from schemas.parse import parse_settings
    from stages.predict import check_suffix
    from stages.predict.inputs import find_images

    if output is not None:
        check_suffix(output)
    if unlabelled == bool(images):
        raise SettingsError(
            "Images and --unlabelled exclude each other." if images else "No images are named.",
            repair="Name images, or predict the images of the study without a label with --unlabelled.",
        )
    if not images:
        _hand_over(_unlabelled(params, assignments or [], model), output)
        return
    settings = parse_settings(override(read_optional_params(params), assignments or []), source=params.name)
    root = params.absolute().parent
    inputs = find_images(images, settings.data, root)
    for note in inputs.notes:
        say(note)
    loaded = load_with(model or root / OUTPUTS / "model", settings, root)
    with ImageBar("Predicting") as bar:
        predictions = loaded.predict_files(inputs.images, progress=bar)
    _hand_over(predictions.rows, output)


def _unlabelled(params: Path, assignments: list[str], model: Path | None) -> Sequence[Prediction]:
    from pipeline.evaluation import predict_unlabelled
    from pipeline.project import open_study

    return predict_unlabelled(open_study(params, assignments), model)[0]


def _hand_over(rows: Sequence[Prediction], output: Path | None) -> None:
    from stages.predict import predictions_csv, write_predictions_table

    if output is None:
        show(predictions_csv(rows).removesuffix("\n"))
    else:
        write_predictions_table(rows, output)
        say(f"{counted(len(rows), 'image')}: {output}")
    failures = [(row.path, row.error) for row in rows if row.error is not None]
    if failures:
        done = len(rows) - len(failures)
        raise UnreadableImagesError(failures, f"{done} of {counted(len(rows), 'image')} predicted.")
