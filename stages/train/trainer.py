"""Stage two: train a method on its declared inputs, and write its bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.results import TrainResult
from schemas.specs import Inputs
from stages.device import set_up
from stages.methods.summed import Sums
from stages.ranks import ALONE, Ranks
from stages.train.checks import check_features, check_rows, check_shared, check_views, check_workers
from stages.train.closed_form import fit_job, sum_job
from stages.train.gradient import train_job
from stages.train.inputs import OpenInputs, StudyFiles, open_inputs
from stages.train.job import SPLITS, Job, Watch
from stages.train.leg import Leg
from stages.train.start import Start, open_start
from stages.train.targets import check_task, targets


def train(
    settings: ResolvedSettings,
    files: StudyFiles,
    output: Path,
    checkpoints: Path,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train a method, and write the bundle of the selected epoch.

    Args:
        settings: Settings of the study.
        files: Manifest, LPM and features of the study.
        output: Folder of the bundle.
        checkpoints: Folder for the checkpoint of an unfinished run, which is removed at the end.
        watch: Callbacks.
        ranks: Position of this process among those that train together, inside `parallel.process_group`. Only rank 0
            writes files.

    Raises:
        CacheMismatchError: If the features were computed under other settings, or nothing was extracted.
        CacheIncompleteError: If the store lacks images, views or shards.
        CacheCorruptError: If bytes of the store changed.
        TransferError: If the remote store cannot be reached.
        WeightsError: If the method needs the LPM's weights and they cannot be loaded.
        BundleError: If training cannot start from the model of `train.start_from`.
        TrainingError: If a class has no training images, the loss is not finite, or the model of `train.start_from` was
            trained on test images.
    """
    (result,) = train_together([settings], files, [output], checkpoints, watch, ranks)
    return result


def train_leg(
    settings: ResolvedSettings, files: StudyFiles, opened: OpenInputs, output: Path, checkpoints: Path, leg: Leg
) -> TrainResult:
    """Train some epochs from given weights, and write the bundle of the last one.

    Args:
        settings: Settings of the complete training, with `train.keep: last`.
        files: As for `train`.
        opened: Inputs of `files`, checked with `open_checked`; left open.
        output: Folder of the bundle.
        checkpoints: As for `train`.
        leg: Epochs and initial weights.

    Raises:
        TrainingError: If the loss is not finite.
    """
    inputs = METHODS[settings.method].reads(settings)
    (result,) = train_job(_job([settings], files, inputs, opened, [output], checkpoints, leg=leg))
    return result


def sum_rows(settings: ResolvedSettings, files: StudyFiles, opened: OpenInputs) -> Sums:
    """Return the sums of a summed method over training rows, of which classes may be absent.

    Args:
        settings: Settings, with class weights as a list or none.
        files: As for `train`.
        opened: Inputs of `files`, checked with `open_checked`.
    """
    return sum_job(_job([settings], files, METHODS[settings.method].inputs, opened, [], Path(), leg=Leg({}, 1, 1)))


def open_checked(variants: Sequence[ResolvedSettings], files: StudyFiles) -> tuple[Inputs, OpenInputs]:
    """Open the inputs of variants, and check that they fit the settings and have all rows.

    Raises:
        Exception: As for `train`.
    """
    first = variants[0]
    row = METHODS[first.method]
    check_task(first, files.manifest)
    inputs: Inputs = frozenset().union(*(row.reads(settings) for settings in variants))
    if "image" not in inputs:
        receipt = files.need_receipt(row.images_setting)
        for settings in variants:
            check_features(settings, files.lpm, receipt)
        check_views(first, receipt)
    opened = open_inputs(first, files, inputs)
    try:
        if opened.store is not None:
            opened.store.require_complete()
            check_rows(first, files.manifest, opened.store)
    except BaseException:
        opened.close()
        raise
    return inputs, opened


def _job(
    variants: Sequence[ResolvedSettings],
    files: StudyFiles,
    inputs: Inputs,
    opened: OpenInputs,
    outputs: Sequence[Path],
    checkpoints: Path,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
    leg: Leg | None = None,
    start: Start | None = None,
) -> Job:
    return Job(
        variants=variants,
        outputs=outputs,
        checkpoints=checkpoints,
        files=files,
        inputs=inputs,
        opened=opened,
        labels={split: targets(files.manifest, split) for split in SPLITS},
        device=set_up(variants[0].compute),
        watch=watch or Watch(),
        ranks=ranks,
        leg=leg,
        start=start,
    )


def train_together(
    variants: Sequence[ResolvedSettings],
    files: StudyFiles,
    outputs: Sequence[Path],
    checkpoints: Path,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> list[TrainResult]:
    """Train several variants on one stream of batches, so that inputs are read and dequantised only once.

    Each variant gives the same model as if trained by itself with the same `train.order_seed`, up to the rounding of
    larger matrix products.

    Args:
        variants: Settings that differ only in `FREE` fields of `train`.
        files: As for `train`.
        outputs: Bundle folder of each variant.
        checkpoints: As for `train`.
        watch: As for `train`.
        ranks: As for `train`.

    Raises:
        SettingsError: If the variants cannot share their batches, or the processes the workers of an extrapolation.
        Exception: As for `train`.
    """
    check_shared(variants)
    check_workers(variants[0], ranks)
    inputs, opened = open_checked(variants, files)
    try:
        start = open_start(variants[0], files.root, files.manifest, opened.features)
        job = _job(variants, files, inputs, opened, outputs, checkpoints, watch, ranks, start=start)
        return fit_job(job) if METHODS[variants[0].method].closed_form else train_job(job)
    finally:
        opened.close()
