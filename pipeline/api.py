"""The commands as functions: what `import fpt` offers. Quiet, except for the callbacks that are passed.

Each function does what the `fpt` command of its name does and writes the same files. Notices of the commands go to the
logger `fpt` (level INFO).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.console import quiet, say
from pipeline.loaded_model import ImageLike, Model, Predictions, load, load_study_model
from pipeline.params import PARAMS, as_assignments, override, read_params, write_settings
from pipeline.project import Study, index_folder
from pipeline.project import open_study as open_params
from schemas.errors import FptError, SettingsError
from schemas.features import ExtractionReceipt
from schemas.manifest import PrepareResult, Split
from schemas.methods import METHODS
from schemas.parse import parse_settings
from schemas.results import Metrics, Prediction, TrainResult

if TYPE_CHECKING:
    from schemas.cost import StoreMemory
    from schemas.resolved import ResolvedSettings
    from schemas.results import EpochLog
    from schemas.settings import Settings
    from stages.extract.extractor import Execute, ExtractProgress, Step
    from stages.extract.shard_task import ShardDone
    from stages.progress import Progress

__all__ = [
    "ExtractionReceipt",
    "FptError",
    "ImageLike",
    "Metrics",
    "Model",
    "Prediction",
    "Predictions",
    "PrepareResult",
    "Study",
    "TrainResult",
    "evaluate",
    "extract",
    "init",
    "load",
    "open_study",
    "predict",
    "prepare",
    "train",
]

AnyPath = str | os.PathLike[str]


@quiet
def init(
    folder: AnyPath,
    images: AnyPath,
    *,
    labels: AnyPath | None = None,
    modality: str | None = None,
    version_control: bool = True,
    **overrides: Any,
) -> Study:
    """Make a study: a folder with `params.yaml` and `dvc.yaml`, under Git and DVC. Overwrites nothing.

    Args:
        folder: Of the new study.
        images: Folder of the images: a folder per class, or any folder with `labels`.
        labels: Table with a row per image, or "tags" for the headers of DICOM files; columns are set with
            `data={"label_column": ...}`.
        modality: Kind of the images, for which LPM, resize rule and window are proposed: cxr, fundus, derm, histology,
            us, mri, ct or mammo; None: the published LPM.
        version_control: Whether to set up Git and DVC where they are not yet.
        **overrides: Settings, such as `method="linear"` or `train={"lr": 1e-3}`.

    Raises:
        ProjectError: The folder is a study already.
        SettingsError: With every problem at once.
        DataError: There are no images, or the labels do not fit them.
    """
    from pipeline.proposals import find_modality, notes_on, propose
    from pipeline.scaffold import check_inputs, initialise, labels_setting, undone_on_failure, write_study

    place = Path(folder).expanduser()
    data = {"images": _resolved(images), "labels": labels_setting(None if labels is None else Path(labels))}
    proposed = find_modality(modality)
    settings = parse_settings(override(propose({"data": data}, proposed), as_assignments(overrides)), source="fpt.init")
    for note in check_inputs(settings.data, place):
        say(note)
    with undone_on_failure(place):
        written = write_study(place, settings, notes=notes_on(proposed))
        if version_control:
            initialise(place, written)
    return open_params(place / PARAMS)


@quiet
def open_study(study: AnyPath, **overrides: Any) -> Study:
    """Open a study with its settings.

    Args:
        study: Folder with a `params.yaml`, or the file.
        **overrides: Settings in place of those of the file, such as `method="linear"` or `train={"lr": 1e-3}`; deeper
            keys with `**{"cluster.slurm.queue": "gpu"}`.

    Raises:
        ProjectError: There is no such file.
        SettingsError: With every problem at once.
        UnsupportedModelError: The LPM is unknown or cannot be tapped.
    """
    path = Path(study).expanduser()
    params = path if path.suffix in (".yaml", ".yml") and not path.is_dir() else path / PARAMS
    return open_params(params.absolute(), as_assignments(overrides))


@quiet
def prepare(
    study: Study,
    *,
    redraw: bool = False,
    full: bool = False,
    write_split: AnyPath | None = None,
    progress: Progress | None = None,
) -> PrepareResult:
    """Read images and labels, name every image by its content, give each a split.

    Args:
        study: From `open_study`.
        redraw: Draw all splits again; else known images keep theirs.
        full: Read every image again; else only new and changed files.
        write_split: CSV to write path, label, patient and split to.
        progress: Called with (images read, images).

    Raises:
        UnreadableImagesError: Images cannot be used; all are listed.
        DataError: Images and labels make no data set.
        StorageError: The outputs cannot be written.
    """
    from stages.manifest import read_manifest
    from stages.prepare import MANIFEST_FILE
    from stages.prepare import prepare as run
    from stages.prepare.exports import check_free, write_splits

    data, output = study.settings.data, study.manifest_folder
    table = None if write_split is None else Path(write_split)
    if table is not None:
        check_free(table)
    _adopt(study)
    rendering = study.settings.features.rendering
    result = run(data, study.root, output, progress, study.splits, redraw, index_folder(study.root), full, rendering)
    write_settings(_with_columns(study.settings, result), output)
    if table is not None:
        write_splits(read_manifest(output / MANIFEST_FILE), result, data, table)
    return result


@quiet
def extract(
    study: Study,
    *,
    all_views: bool = False,
    check: bool = False,
    progress: Callable[[ExtractProgress], None] | None = None,
    preparing: Callable[[Step, int, int], None] | None = None,
    execute: Execute | None = None,
) -> ExtractionReceipt:
    """Run the LPM once over every image that the cache lacks. Stopped by Ctrl-C, it keeps the finished shards.

    Args:
        study: After `prepare`.
        all_views: Also compute the augmented views of images that are not trained on in this split.
        check: First compare every byte of the store with its receipts, and compute again what differs.
        progress: Called at the start and after every batch, with `done` and `total` rows.
        preparing: Called before that with a step ("statistics" or "check"), and the done and total images or shards.
        execute: Runs the tasks; None: as `shard_runner` of the settings.

    Raises:
        ManifestError: The study has no manifest.
        WeightsError: The weights are missing or belong to another model.
        UnreadableImagesError: Images vanished or changed since `prepare`; all others are computed first.
        StorageError: The disk is full or cannot be written.
        ClusterError: The workers cannot be reached, or do not fit.
    """
    from stages.extract.extractor import ExtractionJob
    from stages.extract.extractor import extract as run
    from stages.manifest import read_manifest

    manifest, output, settings = read_manifest(study.manifest), study.receipt.parent, study.settings
    job = ExtractionJob(settings, study.root, study.cache, manifest, output, all_views, check)
    receipt = run(job, progress, preparing, execute or shard_runner(settings))
    write_settings(settings, output)
    return receipt


@quiet
def train(
    study: Study,
    *,
    method: str | None = None,
    output: AnyPath | None = None,
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_memory: Callable[[StoreMemory], None] | None = None,
) -> TrainResult:
    """Train the method of the settings. An interrupted training resumes after its last epoch.

    Args:
        study: After `extract`.
        method: In place of the method of the settings.
        output: Folder that gets `model/` and `train/`; None: the outputs of the study.
        on_epoch: Called after each epoch.
        on_memory: Called before the first epoch with the memory that the features need.

    Raises:
        ManifestError: There is no manifest.
        CacheMismatchError: The features were computed under other settings.
        CacheIncompleteError: The store lacks images, views or shards.
        TrainingError: A class has no training images, or the loss is not finite.
    """
    from pipeline.epoch_log import EpochLogger
    from pipeline.sweep_jobs import note_use
    from stages.device import set_up
    from stages.manifest import read_manifest
    from stages.ranks import Ranks
    from stages.train.job import Watch, ignore
    from stages.train.parallel import process_group
    from stages.train.trainer import train as run

    if method is not None:
        study = open_params(study.params, [*study.assignments, f"method={method}"])
    files = study.files(read_manifest(study.manifest))
    here = Ranks.of()
    if here.first:
        note_use(study, files.receipt)
    folder = study.outputs if output is None else Path(output).absolute()
    model = folder / "model"
    epochs = 1 if METHODS[study.settings.method].closed_form else study.settings.train.epochs
    with EpochLogger(folder / "train", epochs) as logger, process_group(here, set_up(study.settings.compute)) as ranks:
        tell = _both(logger, on_epoch)
        watch = Watch(
            on_epoch=(lambda _, log: tell(log)) if ranks.first else ignore,
            on_memory=on_memory or ignore,
            on_notice=say,
        )
        result = run(study.settings, files, model, study.checkpoints, watch, ranks)
        if ranks.first:
            logger.finish(result.best)
    if here.first:
        write_settings(study.settings, model)
    return result


@quiet
def evaluate(
    study: Study,
    *,
    split: Split = "test",
    images: AnyPath | None = None,
    labels: AnyPath | None = None,
    model: AnyPath | None = None,
    output: AnyPath | None = None,
    adapt: str | None = None,
    adapt_batch: int = 64,
    adapt_seed: int = 2020,
) -> Metrics:
    """Evaluate the model on the test split, or on labelled images outside of the study.

    Writes metrics, a table of predictions and an HTML report to `outputs/evaluation`, of other images to
    `outputs/external/NAME`.

    Args:
        study: After `train`.
        split: Images of the study: "train", "val" or "test".
        images: Folder of other images, in place of a split: a folder per class, or any folder with `labels`.
        labels: Table of their labels.
        model: Folder of the model; None: that of the study.
        output: Folder of the results.
        adapt: Adaptation at test time, "foa", "foa-shift" or "vptta". The metrics are then those with it, and those
            without it are written next to them, with both in `adapted-NAME/adapted.json`; None: no adaptation.
        adapt_batch: Images of a batch of foa and foa-shift.
        adapt_seed: Seed of the order of the images, and of the search of foa.

    Raises:
        BundleError: The model is missing, damaged, or was trained for other classes.
        CacheMismatchError: The model was trained on other features.
        EvaluationError: The split is empty, or the outputs of the model are not finite.
        DataError: A label of other images is no class of the model.
    """
    from pipeline.adapt_options import adapt_options
    from pipeline.evaluation import LabelledImages, evaluate_images, evaluate_split

    options = adapt_options(adapt, adapt_batch, adapt_seed)
    place, folder = (None if path is None else Path(path) for path in (model, output))
    if images is None:
        if labels is not None:
            raise SettingsError("labels belong to images.", repair="Name the folder of the images: images=FOLDER")
        metrics, adapted, _ = evaluate_split(study, split, place, folder, options)
        return metrics if adapted is None else adapted.adapted
    others = LabelledImages(Path(images), None if labels is None else Path(labels))
    result, _ = evaluate_images(study.params, study.assignments, others, place, folder, adapt=options)
    return result.metrics if result.adapted is None else result.adapted.adapted


@quiet
def predict(
    study_or_model: Study | Model | AnyPath,
    images: ImageLike | Iterable[ImageLike] | None = None,
    *,
    on_error: Literal["raise", "keep"] = "raise",
    progress: Progress | None = None,
    adapt: str | None = None,
) -> Predictions:
    """Predict the class of each image. `fpt.load` keeps a model in memory for several calls.

    Args:
        study_or_model: A study after `train`, a loaded model, or the folder of a model.
        images: As for `Model.predict`; None: the images of a study that have no label (`data.unlabelled: allow`).
        on_error: As for `Model.predict`.
        progress: Called after each batch with (done, total) images.
        adapt: As for `Model.predict`.

    Raises:
        FptError: As `load` and `Model.predict`.
    """
    if images is None:
        if not isinstance(study_or_model, Study):
            raise SettingsError("A model has no images of its own.", repair="Name images, or pass the study.")
        from pipeline.evaluation import predict_unlabelled

        rows, classes = predict_unlabelled(study_or_model, None)
        return Predictions(tuple(rows), classes)
    if isinstance(study_or_model, Study):
        model = load_study_model(study_or_model)
    else:
        model = study_or_model if isinstance(study_or_model, Model) else load(study_or_model)
    return model.predict(images, on_error=on_error, progress=progress, adapt=adapt)


def _resolved(path: AnyPath) -> str:
    return str(Path(path).expanduser().resolve())


def _both(first: Callable[[EpochLog], None], second: Callable[[EpochLog], None] | None) -> Callable[[EpochLog], None]:
    if second is None:
        return first

    def call(log: EpochLog) -> None:
        first(log)
        second(log)

    return call


def shard_runner(settings: ResolvedSettings) -> Callable[..., Iterable[ShardDone]]:
    """Return what computes shards under these settings, this process or a cluster: `inline` or `on_cluster`."""
    if settings.cluster.kind == "inline":
        from stages.extract.shard_task import inline

        return inline
    from pipeline.cluster.executor import on_cluster

    return on_cluster


def _adopt(study: Study) -> None:
    """Let images of a manifest that is there keep its splits, although nothing else is known of its draw.

    Such a manifest was pulled with DVC, or written before splits were kept.
    """
    from stages.manifest import read_manifest
    from stages.prepare import MANIFEST_FILE
    from stages.prepare.split_history import KnownSplits, is_known, same_draw, write_known

    data, file = study.settings.data, study.manifest_folder / MANIFEST_FILE
    if is_known(study.splits, data) or not file.exists():
        return
    try:
        drawn_with = parse_settings(read_params(file.with_name("settings.yaml"))).data
        manifest = read_manifest(file)
    except FptError:
        # Damaged, or without its settings: `prepare` replaces it.
        return
    if same_draw(drawn_with, data):
        write_known(study.splits, data, KnownSplits().with_manifest(manifest), manifest)


def _with_columns(settings: Settings, result: PrepareResult) -> Settings:
    """The settings with the columns that "auto" stood for."""
    columns = {"group_column": result.group_column, "split_column": result.split_column}
    return settings.model_copy(update={"data": settings.data.model_copy(update=columns)})
