"""`fpt evaluate`: how good the model is on images that it did not see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from pipeline import adapt_options
from pipeline.console import say, score, show, show_json, show_table
from pipeline.evaluation import LabelledImages
from pipeline.metric_names import metric_name
from pipeline.metric_tables import show_metrics
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from pipeline.waiting import wait_briefly
from schemas.errors import SettingsError
from schemas.tasks import METRICS
from schemas.test_time import remarks
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.results import Metrics
    from schemas.test_time import Adapted, AdaptOptions
    from stages.progress import Progress


class SplitName(StrEnum):
    """Images to evaluate."""

    train = "train"
    val = "val"
    test = "test"


ModelFolder: TypeAlias = Annotated[
    Path | None, typer.Option("--model", help="Folder of the model; else outputs/model.", show_default=False)
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Folder of the results; else outputs/evaluation, with --images outputs/external/NAME.",
        show_default=False,
    ),
]
SplitOption: TypeAlias = Annotated[
    SplitName | None, typer.Option("--split", help="Images of the study; else test.", show_default=False)
]
Images: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Evaluate images outside of the study: a folder per class, or any folder with --labels.",
        show_default=False,
        exists=True,
        file_okay=False,
    ),
]
Labels: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="TABLE",
        help="Labels of --images; columns as in the settings, such as --set data.label_column=NAME.",
        show_default=False,
        exists=True,
        dir_okay=False,
    ),
]


def evaluate(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    model: ModelFolder = None,
    output: Output = None,
    split: SplitOption = None,
    images: Images = None,
    labels: Labels = None,
    adapt: adapt_options.Name = None,
    adapt_batch: adapt_options.Batch = adapt_options.DEFAULTS.batch,
    adapt_seed: adapt_options.Seed = adapt_options.DEFAULTS.seed,
    as_json: AsJson = False,
) -> None:
    """Evaluate the model on the test split, or on images outside of the study: metrics, predictions, HTML report.

    Images outside of the study need no study: a model is enough, with --model and --set lpm.weights=FILE. With --adapt
    the same images are evaluated a second time, into the folder adapted-NAME of the results.
    """
    options = adapt_options.adapt_options(None if adapt is None else adapt.value, adapt_batch, adapt_seed)
    if images is None:
        if labels is not None:
            raise SettingsError("--labels belongs to --images.", repair="Name the folder of the images: --images DIR")
        metrics, adapted, folder = _evaluate_split(
            params, assignments or [], model, output, split or SplitName.test, options
        )
    else:
        if split is not None:
            raise SettingsError("--split is for images of the study, --images for others.", repair="Leave one out.")
        metrics, adapted, folder = _evaluate_images(
            params, assignments or [], model, output, LabelledImages(images, labels), options
        )
    if as_json:
        show_json((metrics if adapted is None else adapted).model_dump(mode="json"))
        return
    show_metrics(metrics)
    if adapted is not None:
        _show_adapted(adapted)
    say(f"Report: {folder / 'report.html'}")


def _evaluate_split(
    params: Path,
    assignments: Sequence[str],
    model: Path | None,
    output: Path | None,
    split: SplitName,
    adapt: AdaptOptions | None,
) -> tuple[Metrics, Adapted | None, Path]:
    from pipeline.evaluation import evaluate_split
    from pipeline.project import open_study

    return evaluate_split(open_study(params, assignments), split.value, model, output, adapt)


def _evaluate_images(
    params: Path,
    assignments: Sequence[str],
    model: Path | None,
    output: Path | None,
    images: LabelledImages,
    adapt: AdaptOptions | None,
) -> tuple[Metrics, Adapted | None, Path]:
    wait_briefly()
    from pipeline.evaluation import evaluate_images
    from stages.prepare import QUARANTINE_FILE
    from stages.progress import ExternalProgress

    with ExitStack() as stack:
        progress = ExternalProgress(_bar(stack, "Reading"), _bar(stack, "Predicting"))
        result, folder = evaluate_images(params, assignments, images, model, output, progress, adapt)
    for note in result.notes:
        say(note)
    say(f"{counted(result.cached, 'image')} from the cache, {result.computed} computed.")
    if result.quarantined:
        say(f"{counted(result.quarantined, 'image')} set aside: {folder / QUARANTINE_FILE}")
    return result.metrics, result.adapted, folder


def _bar(stack: ExitStack, what: str) -> Progress:
    """A bar that opens when its stage begins, in place of the bar of the stage before."""
    from pipeline.progress import ImageBar

    opened: list[ImageBar] = []

    def show_progress(done: int, total: int) -> None:
        if not opened:
            stack.close()
            opened.append(stack.enter_context(ImageBar(what)))
        opened[0](done, total)

    return show_progress


def _show_adapted(adapted: Adapted) -> None:
    fields = METRICS[adapted.without.task]
    rows = [
        [metric_name(field, adapted.without.task, start=True), *(score(getattr(one, field)) for one in both)]
        for both in [(adapted.without, adapted.adapted)]
        for field in fields
    ]
    show_table(f"Adapted by {adapted.adapt.name}", ["metric", "without", "with adaptation"], rows)
    for warning in remarks(adapted.adapt, adapted.without.images):
        show(f"Warning: {warning}")
