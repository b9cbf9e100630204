"""Evaluate a bundle on one split of the manifest, from cached features only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import BundleError, CacheMismatchError, EvaluationError
from schemas.features import ExtractionReceipt
from schemas.manifest import Manifest, ManifestRow, Split
from schemas.results import BundleSpec, JudgedModel, Metrics
from schemas.tasks import Task
from stages import scores
from stages.evaluate.curves import roc_curves, write_plots
from stages.evaluate.predictions import Predictions, write_predictions
from stages.evaluate.report import confident_mistakes, render_report
from stages.evaluate.scoring import score, split_warnings
from stages.files import atomic_write
from stages.store.reader import StoreReader
from stages.store.remote_rows import open_rows
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import store_logits


def evaluate(
    manifest: Manifest,
    receipt: ExtractionReceipt,
    bundle_dir: Path,
    cache_root: Path,
    output: Path,
    split: Split = "test",
    *,
    train_dir: Path | None = None,
    device: torch.device | str = "cpu",
    remote: str | None = None,
) -> Metrics:
    """Evaluate a model and write `predictions.parquet`, `metrics.json`, `plots/` and `report.html`.

    Args:
        manifest: From `prepare`.
        receipt: From `extract`.
        bundle_dir: From `train`.
        cache_root: Folder of all stores.
        output: Folder of the four results.
        split: Which rows to evaluate.
        train_dir: DVCLive's folder, for the training curves in the report; None: the folder `train` beside the
            bundle's. Without it there are no curves.
        device: Of the side network.
        remote: `store.remote` of the settings, a relative folder taken from the study's: read where the cache root
            lacks the store.

    Raises:
        BundleError: The bundle is missing or damaged, or was trained for other classes.
        CacheMismatchError: The bundle was trained on other features than the receipt's.
        CacheIncompleteError: The store lacks an image or a shard.
        CacheCorruptError: Bytes of the store changed.
        TransferError: The remote store cannot be reached.
        EvaluationError: The split is empty, or the model's outputs are not finite.
        StorageError: The results cannot be written.
    """
    bundle = load_bundle(bundle_dir, device)
    check_fit(bundle.spec, manifest, receipt)
    rows = _rows(manifest, split)
    store = open_rows(cache_root, receipt, remote)
    try:
        found = _probabilities(bundle, store, rows)
        predictions = Predictions(
            manifest.classes, rows, found, evaluated_model(bundle.spec), manifest.task, manifest.unit
        )
        metrics = score(predictions, split_warnings(bundle.spec, split, manifest))
        report = render_report(
            metrics,
            predictions,
            manifest,
            bundle.spec,
            thumbnails=_thumbnails(predictions, store),
            train_dir=bundle_dir.parent / "train" if train_dir is None else train_dir,
        )
    finally:
        store.close()
    write_evaluation(predictions, metrics, report, output)
    return metrics


def write_evaluation(predictions: Predictions, metrics: Metrics, report: str, output: Path) -> None:
    """Write the four results of an evaluation.

    Raises:
        StorageError: The results cannot be written.
    """
    labels, classes = predictions.labels, predictions.classes
    write_predictions(predictions, output / "predictions.parquet")
    roc = roc_curves(labels, predictions.probabilities.astype(np.float64), classes)
    write_plots(labels, predictions.predicted, roc, classes, output / "plots")
    atomic_write(output / "report.html", report.encode())
    atomic_write(output / "metrics.json", (metrics.model_dump_json(indent=1) + "\n").encode())


def check_fit(spec: BundleSpec, manifest: Manifest, receipt: ExtractionReceipt) -> None:
    """Refuse a bundle that was trained for another task, for other classes or on other features."""
    if spec.task != manifest.task:
        raise BundleError(
            f"The model was trained for {spec.task}; the manifest is {manifest.task}.",
            "data.task changed after the model was trained.",
            "Run `fpt train` again.",
        )
    if spec.classes != manifest.classes:
        raise BundleError(
            f"The model knows the classes {', '.join(spec.classes)}; the manifest has {', '.join(manifest.classes)}.",
            "The labels, or data.classes, changed after the model was trained.",
            "Run `fpt train` again.",
        )
    if differing := spec.features.differing(receipt.spec):
        raise CacheMismatchError(
            "The model was trained on other features than those that are extracted.",
            differing,
            "The features were extracted anew after the model was trained.",
            "Run `fpt train` again, or extract the features of the model: `fpt extract` with its settings.",
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


def evaluated_model(spec: BundleSpec) -> JudgedModel:
    """What a table of predictions records about its model."""
    return JudgedModel(
        method=spec.network.method,
        lpm=spec.features.lpm.name,
        learnable=spec.learnable,
        weights_sha256=spec.weights_sha256,
    )


def _probabilities(bundle: Bundle, store: StoreReader, rows: tuple[ManifestRow, ...]) -> npt.NDArray[np.float32]:
    """(n, C). A file under two names is computed once."""
    position = {image_id: number for number, image_id in enumerate(dict.fromkeys(row.id for row in rows))}
    logits = store_logits(bundle, store, list(position))
    return probabilities(logits, bundle.spec.task)[[position[row.id] for row in rows]]


def probabilities(logits: torch.Tensor, task: Task = "multiclass") -> npt.NDArray[np.float32]:
    """(n, C) logits to (n, C) probabilities, computed in double precision."""
    p: npt.NDArray[np.float32] = scores.probabilities(logits, task).float().numpy()
    return p


def _thumbnails(predictions: Predictions, store: StoreReader) -> dict[str, npt.NDArray[Any]]:
    """The stored side images of the mistakes that the report shows, by image id."""
    ids = [predictions.rows[row].id for row in confident_mistakes(predictions)]
    if not ids:
        return {}
    return dict(zip(ids, store.read(ids, ["side"])["side"], strict=True))
