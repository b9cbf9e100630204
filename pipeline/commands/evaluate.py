"""`fpt evaluate`: how good the model is on images that it did not see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.predict import lpm_of
from pipeline.console import say, score, show, show_json, show_pairs, show_table
from pipeline.metric_names import MARKS, metric_name
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import ManifestError, SettingsError
from schemas.settings import OUTPUTS
from schemas.tasks import METRICS
from schemas.text import counted, images_of

if TYPE_CHECKING:
    from schemas.manifest import Manifest
    from schemas.results import BundleSpec, Metrics
    from schemas.settings import Settings
    from stages.progress import Progress


class SplitName(StrEnum):
    """Images to evaluate."""

    train = "train"
    val = "val"
    test = "test"


def evaluate(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model; else outputs/model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder of the results; else outputs/evaluation, with --images outputs/external/NAME.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        SplitName | None, typer.Option("--split", help="Images of the study; else test.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Evaluate images outside of the study: a folder per class, or any folder with --labels.",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="TABLE",
            help="Labels of --images; columns as in the settings, such as --set data.label_column=NAME.",
            show_default=False,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the model on the test split, or on images outside of the study: metrics, predictions, HTML report.

    Images outside of the study need no study: a model is enough, with --model and --set lpm.weights=FILE.
    """
    if images is None:
        if labels is not None:
            raise SettingsError("--labels belongs to --images.", repair="Name the folder of the images: --images DIR")
        metrics, folder = _evaluate_split(params, assignments or [], model, output, split or SplitName.test)
    else:
        if split is not None:
            raise SettingsError("--split is for images of the study, --images for others.", repair="Leave one out.")
        metrics, folder = _evaluate_images(params, assignments or [], model, output, images, labels)
    if as_json:
        show_json(metrics.model_dump(mode="json"))
        return
    _show(metrics)
    say(f"Report: {folder / 'report.html'}")


def _evaluate_split(
    params: Path, assignments: Sequence[str], model: Path | None, output: Path | None, split: SplitName
) -> tuple[Metrics, Path]:
    from pipeline.project import open_study
    from stages.device import set_up
    from stages.evaluate.evaluator import evaluate as run
    from stages.manifest import read_manifest

    study = open_study(params, assignments)
    bundle = study.outputs / "model" if model is None else model.absolute()
    folder = study.outputs / "evaluation" if output is None else output.absolute()
    metrics = run(
        study.files(read_manifest(study.manifest)),
        bundle,
        folder,
        split.value,
        device=set_up(study.settings.compute),
    )
    _keep_settings(bundle, study.settings, folder)
    return metrics, folder


def _evaluate_images(
    params: Path,
    assignments: Sequence[str],
    model: Path | None,
    output: Path | None,
    images: Path,
    labels: Path | None,
) -> tuple[Metrics, Path]:
    from pipeline.project import cache_root
    from stages.device import set_up
    from stages.extract.shard_task import batch_size
    from stages.predict.external import evaluate_external
    from stages.prepare import QUARANTINE_FILE
    from stages.train.bundle import read_spec

    root = params.absolute().parent
    bundle = root / OUTPUTS / "model" if model is None else model.absolute()
    folder = root / OUTPUTS / "external" / images.resolve().name if output is None else output.absolute()
    spec = read_spec(bundle)
    settings = _external_settings(params, assignments, spec, images, labels)
    device = set_up(settings.compute)
    study = _manifest_of(bundle, root)
    with ExitStack() as stack:
        result = evaluate_external(
            bundle,
            settings.data,
            root,
            folder,
            lpm=lpm_of(spec, settings),
            cache_root=cache_root(root),
            study=study,
            device=device,
            batch_size=batch_size(settings.compute, device),
            reading=_bar(stack, "Reading"),
            predicting=_bar(stack, "Predicting"),
        )
    _keep_settings(bundle, settings, folder)
    for note in result.notes:
        say(note)
    say(f"{counted(result.cached, 'image')} from the cache, {result.computed} computed.")
    if result.quarantined:
        say(f"{counted(result.quarantined, 'image')} set aside: {folder / QUARANTINE_FILE}")
    return result.metrics, folder


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


def _external_settings(
    params: Path, assignments: Sequence[str], spec: BundleSpec, images: Path, labels: Path | None
) -> Settings:
    """Settings of the study, where there is one, about other images: task and grades are those of the model."""
    from pipeline.params import override, read_optional_params
    from schemas.parse import parse_settings

    base = read_optional_params(params)
    data = base.get("data")
    if isinstance(data, dict):
        # What only the study's own table has.
        own = {"split_column"} if labels is not None else {"split_column", "group_column"}
        base = {**base, "data": {key: value for key, value in data.items() if key not in own}}
    tree = override(base, assignments)
    data = tree.setdefault("data", {})
    if isinstance(data, dict):
        data["images"] = str(images.absolute())
        data["labels"] = None if labels is None else str(labels.absolute())
        data.setdefault("task", spec.task)
        data["classes"] = list(spec.classes)
    return parse_settings(tree, source=params.name)


def _manifest_of(bundle: Path, root: Path) -> Manifest | None:
    """Manifest of the study that a bundle lies in, else of the study in `root`."""
    from stages.manifest import read_manifest

    for folder in (*bundle.resolve().parents, root):
        path = folder / OUTPUTS / "manifest" / "manifest.parquet"
        if path.exists():
            try:
                return read_manifest(path)
            except ManifestError as error:
                say(f"{error.state} Whether the model was trained on some of the images is not known.")
                return None
    say("There is no study beside the model: whether it was trained on some of the images is not known.")
    return None


def _keep_settings(bundle: Path, settings: Settings, folder: Path) -> None:
    """The settings of the model beside its evaluation; params.yaml may have changed since."""
    from pipeline.params import write_settings
    from stages.files import atomic_write, read_regular

    trained = bundle / "settings.yaml"
    if trained.exists():
        atomic_write(folder / "settings.yaml", read_regular(trained))
    else:
        write_settings(settings, folder)


def _show(metrics: Metrics) -> None:

    for warning in metrics.warnings:
        show(f"Warning: {warning}")
    intervals = {}
    if metrics.auc_interval is not None:
        intervals["auc"] = f"  (95%: {metrics.auc_interval[0]:.3f} to {metrics.auc_interval[1]:.3f})"
    show_pairs(
        f"{metrics.split}: {images_of(metrics.images, metrics.groups, metrics.unit)}",
        [
            (metric_name(field, metrics.task, start=True), score(getattr(metrics, field)) + intervals.get(field, ""))
            for field in METRICS[metrics.task]
        ],
    )
    classes = [f'"{name}"' for name in metrics.auc_per_class]
    rows = [
        [name, *(str(count) for count in counts), score(auc)]
        for name, counts, auc in zip(classes, metrics.confusion, metrics.auc_per_class.values(), strict=True)
    ]
    if metrics.task == "multilabel":
        show_table("Images by label, at a probability of 0.5", ["label", *MARKS, "AUC"], rows)
    else:
        show_table("Labels (rows) and predictions (columns)", ["label", *classes, "AUC"], rows)
