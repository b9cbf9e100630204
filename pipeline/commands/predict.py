"""`fpt predict`: classes of new images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from pipeline import adapt_options
from pipeline.console import say, show
from pipeline.options import PARAMS_FILE, Assignments, Params
from pipeline.waiting import wait_briefly
from schemas.errors import SettingsError, UnreadableImagesError
from schemas.settings import OUTPUTS
from schemas.test_time import remarks
from schemas.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.results import Prediction


Images: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        help="Images, folders, patterns ('images/*.png'), lists (@list.txt) or tables with paths (.csv).",
        show_default=False,
    ),
]
Unlabelled: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--unlabelled",
        help="Predict the images of the study that have no label (data.unlabelled: allow), from cached features.",
    ),
]
ModelFolder: TypeAlias = Annotated[
    Path | None, typer.Option("--model", help="Folder of the model; else outputs/model.", show_default=False)
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--output", help="Table to write: .csv, .tsv, .parquet or .xlsx; else CSV is printed.", show_default=False
    ),
]


def predict(
    images: Images = None,
    unlabelled: Unlabelled = False,
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    model: ModelFolder = None,
    output: Output = None,
    adapt: adapt_options.Name = None,
    adapt_batch: adapt_options.Batch = adapt_options.DEFAULTS.batch,
    adapt_seed: adapt_options.Seed = adapt_options.DEFAULTS.seed,
) -> None:
    """Classify new images. Features are computed in memory; the cache is not touched.

    The model folder is enough: without a params.yaml the LPM comes from the hub, or from --set lpm.weights=FILE. Images
    that cannot be used have an error in their row, and are listed at the end with exit code 2. With --adapt there are
    further columns, adapted_predicted and adapted_p_CLASS.
    """
    from pipeline.loaded_model import load_with
    from pipeline.params import override, read_optional_params
    from pipeline.progress import ImageBar
    from schemas.parse import parse_settings
    from stages.predict import check_suffix
    from stages.predict.inputs import find_images

    options = adapt_options.adapt_options(None if adapt is None else adapt.value, adapt_batch, adapt_seed)
    if output is not None:
        check_suffix(output)
    if unlabelled == bool(images):
        raise SettingsError(
            "Images and --unlabelled exclude each other." if images else "No images are named.",
            repair="Name images, or predict the images of the study without a label with --unlabelled.",
        )
    if not images:
        if options is not None:
            raise SettingsError("--adapt is for images that are named.", repair="Leave out --adapt or --unlabelled.")
        _hand_over(_unlabelled(params, assignments or [], model), output)
        return
    wait_briefly()
    settings = parse_settings(override(read_optional_params(params), assignments or []), source=params.name)
    root = params.absolute().parent
    inputs = find_images(images, settings.data, root)
    for note in inputs.notes:
        say(note)
    loaded = load_with(model or root / OUTPUTS / "model", settings, root)
    if options is not None:
        for remark in remarks(options, len(inputs.images)):
            say(f"Warning: {remark}")
    with ImageBar("Predicting") as bar:
        predictions = loaded.predict_files(inputs.images, progress=bar, adapt=options)
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
