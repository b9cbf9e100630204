"""Evaluate a bundle on one split of the manifest, from the inputs that its method reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import BundleError, EvaluationError
from schemas.manifest import Manifest, ManifestRow, Split
from schemas.methods import model_inputs
from schemas.results import BundleSpec, EvaluatedModel, Metrics
from schemas.tasks import Task
from stages import scores
from stages.evaluate.curves import roc_curves, write_plots
from stages.evaluate.federated import read_federated
from stages.evaluate.pictures import mapped_rows
from stages.evaluate.predictions import TABLE, Predictions, write_predictions
from stages.evaluate.report import confident_mistakes, render_report
from stages.evaluate.scoring import score, split_warnings
from stages.files import atomic_write
from stages.methods.batch import IMAGE, array_names
from stages.pixels import to_size
from stages.store.memory_rows import RowSource
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import source_logits, source_maps
from stages.train.inputs import StudyFiles, open_arrays

THUMBNAIL = 144
"""Side of an image in the report, in pixels, where no small image is stored."""


def evaluate(
    files: StudyFiles,
    bundle_dir: Path,
    output: Path,
    split: Split = "test",
    *,
    train_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Metrics:
    """Evaluate a model and write `predictions.parquet`, `metrics.json`, `plots/` and `report.html`.

    Args:
        files: Manifest, LPM and features of the study.
        bundle_dir: From `train`.
        output: Folder of the four results.
        split: Which rows to evaluate.
        train_dir: DVCLive's folder, for the training curves in the report; None: the folder `train` next to the
            bundle's. Without it the report has no curves.
        device: Where the model computes.

    Raises:
        BundleError: The bundle is missing or damaged, or was trained for other classes.
        CacheMismatchError: The bundle was trained on other features than the receipt's.
        CacheIncompleteError: The store lacks an image or a shard.
        CacheCorruptError: Bytes of the store changed.
        TransferError: The remote store cannot be reached.
        WeightsError: The model needs the LPM, and its weights are missing or not those of training.
        EvaluationError: The split is empty, or the model's outputs are not finite.
        StorageError: The results cannot be written.
    """
    bundle, manifest = load_bundle(bundle_dir, device), files.manifest
    check_fit(bundle.spec, manifest)
    rows = _rows(manifest, split)
    with open_source(bundle, files) as source:
        found = row_probabilities(bundle, source, rows)
        predictions = Predictions(
            manifest.classes, rows, found, evaluated_model(bundle.spec), manifest.task, manifest.unit
        )
        metrics = score(predictions, split_warnings(bundle.spec, split, manifest))
        maps = source_maps(bundle, source, [rows[row].id for row in mapped_rows(predictions)])
        report = render_report(
            metrics,
            predictions,
            manifest,
            bundle.spec,
            thumbnails=_thumbnails(predictions, source, mapped_rows(predictions) if maps else []),
            maps={name: values.numpy() for name, values in maps.items()},
            train_dir=bundle_dir.parent / "train" if train_dir is None else train_dir,
            federated=read_federated(bundle_dir, bundle.spec),
        )
    write_evaluation(predictions, metrics, report, output)
    return metrics


def open_source(bundle: Bundle, files: StudyFiles) -> AbstractContextManager[RowSource]:
    """Open what the model reads, until the block ends, and give it the LPM if it needs it.

    Raises:
        FptError: As `stages.train.inputs.open_arrays` and `stages.lpm.matching.load_matching`.
    """
    spec = bundle.spec.features
    if bundle.network.needs_lpm:
        # Imported late: models of cached features need no code of the LPM.
        from stages.lpm.matching import load_matching

        bundle.network.use_lpm(load_matching(spec, files.weights_source, files.root, bundle.device).model)
    return open_arrays(files, spec, array_names(model_inputs(bundle.spec.network)))


def write_evaluation(predictions: Predictions, metrics: Metrics, report: str, output: Path) -> None:
    """Write the four results of an evaluation.

    Raises:
        StorageError: The results cannot be written.
    """
    labels, classes = predictions.labels, predictions.classes
    write_predictions(predictions, output / TABLE)
    roc = roc_curves(labels, predictions.probabilities.astype(np.float64), classes)
    write_plots(labels, predictions.predicted, roc, classes, output / "plots")
    atomic_write(output / "report.html", report.encode())
    atomic_write(output / "metrics.json", (metrics.model_dump_json(indent=1) + "\n").encode())


def check_fit(spec: BundleSpec, manifest: Manifest) -> None:
    """Refuse a bundle that was trained for another task or for other classes."""
    if spec.task != manifest.task:
        raise BundleError(
            f"The model was trained for {spec.task}; the manifest is {manifest.task}.",
            "data.task changed after the model was trained.",
            "Run `fpt train` again.",
        )
    if spec.classes != manifest.classes:
        raise BundleError(
            f"The model was trained for the classes {', '.join(spec.classes)}; "
            f"the manifest has {', '.join(manifest.classes)}.",
            "The labels, or data.classes, changed after the model was trained.",
            "Run `fpt train` again.",
        )


def _rows(manifest: Manifest, split: Split) -> tuple[ManifestRow, ...]:
    rows = tuple(manifest.of(split))
    if not rows:
        raise EvaluationError(
            f"The {split} split has no images.",
            "No row of the manifest belongs to it.",
            "Raise its share or fill data.split_column, then run `fpt prepare`; or choose another split with --split.",
        )
    return rows


def evaluated_model(spec: BundleSpec) -> EvaluatedModel:
    """What a table of predictions records about its model."""
    return EvaluatedModel(
        method=spec.network.method,
        lpm=spec.features.lpm.name,
        learnable=spec.learnable,
        weights_sha256=spec.weights_sha256,
    )


def row_probabilities(bundle: Bundle, source: RowSource, rows: Sequence[ManifestRow]) -> npt.NDArray[np.float32]:
    """Return the probabilities of the rows, (n, C). A file under two names is computed once."""
    position = {image_id: number for number, image_id in enumerate(dict.fromkeys(row.id for row in rows))}
    logits = source_logits(bundle, source, list(position))
    return probabilities(logits, bundle.spec.task)[[position[row.id] for row in rows]]


def probabilities(logits: torch.Tensor, task: Task = "multiclass") -> npt.NDArray[np.float32]:
    """(n, C) logits to (n, C) probabilities, computed in double precision."""
    p: npt.NDArray[np.float32] = scores.probabilities(logits, task).float().numpy()
    return p


def _thumbnails(predictions: Predictions, source: RowSource, others: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Small images of the mistakes that the report shows, and of other rows, by image id."""
    ids = list(dict.fromkeys(predictions.rows[row].id for row in (*confident_mistakes(predictions), *others)))
    if not ids:
        return {}
    name = "side" if "side" in source.layouts else IMAGE
    pixels = source.read_rows(source.locate(ids), ids, [name])[name]
    if name == IMAGE:
        pixels = to_size(torch.from_numpy(pixels), THUMBNAIL).numpy()
    return dict(zip(ids, pixels, strict=True))
