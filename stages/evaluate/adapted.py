"""Evaluate with adaptation at test time, next to the evaluation of the same rows without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from schemas.manifest import Manifest
from schemas.results import BundleSpec, Metrics
from schemas.test_time import Adapted, AdaptOptions, remarks
from stages.evaluate.evaluator import probabilities, write_evaluation
from stages.evaluate.predictions import TABLE, Predictions, read_predictions
from stages.evaluate.report import render_report
from stages.evaluate.scoring import score
from stages.files import atomic_write
from stages.test_time.stream import adapted_logits
from stages.train.bundle import load_bundle
from stages.train.inputs import StudyFiles


def adapted_folder(output: Path, options: AdaptOptions) -> Path:
    """Return the folder of the results with adaptation, within that of the results without it."""
    return output / f"adapted-{options.name}"


def evaluate_adapted(
    files: StudyFiles,
    bundle_dir: Path,
    output: Path,
    without: Metrics,
    options: AdaptOptions,
    device: torch.device | str = "cpu",
) -> Adapted:
    """Evaluate a model with adaptation on the rows of an evaluation without it.

    Writes the files of an evaluation, and `adapted.json` with both metrics, to the folder `adapted-NAME` of `output`.

    Args:
        files: Manifest, LPM and features of the study.
        bundle_dir: From `train`.
        output: Folder of the evaluation without adaptation.
        without: Its metrics.
        options: Kind of the adaptation, batch size and seed.
        device: Where the model computes.

    Raises:
        EvaluationError: The model cannot be adapted in this way, or there are too few images.
        FptError: As `stages.evaluate.evaluator.evaluate`, and for missing statistics of source images.
    """
    bundle = load_bundle(bundle_dir, device)
    plain = read_predictions(output / TABLE)
    ids = list(dict.fromkeys(row.id for row in plain.rows))
    logits = adapted_logits(bundle, files, bundle_dir, ids, options)
    position = {image_id: at for at, image_id in enumerate(ids)}
    found = probabilities(logits, bundle.spec.task)[[position[row.id] for row in plain.rows]]
    return write_adapted(plain, found, files.manifest, bundle.spec, output, without, options)


def write_adapted(
    plain: Predictions,
    adapted: npt.NDArray[np.float32],
    manifest: Manifest,
    spec: BundleSpec,
    output: Path,
    without: Metrics,
    options: AdaptOptions,
) -> Adapted:
    """Score adapted probabilities (n, C) of evaluated rows, and write them.

    Args:
        plain: Predictions without adaptation.
        adapted: Probabilities with it, in the same order.
        manifest: All rows of the study, for the report.
        spec: Of the model.
        output: Folder of the evaluation without adaptation.
        without: Its metrics.
        options: Kind of the adaptation, batch size and seed.

    Raises:
        StorageError: The results cannot be written.
    """
    predictions = replace(plain, probabilities=adapted)
    images = len({row.id for row in plain.rows})
    warnings = (*without.warnings, *remarks(options, images))
    metrics = score(predictions, warnings)
    metrics = metrics.model_copy(update={"warnings": (*warnings, compared(without, metrics))})
    report = render_report(metrics, predictions, manifest, spec)
    folder, result = adapted_folder(output, options), Adapted(adapt=options, without=without, adapted=metrics)
    write_evaluation(predictions, metrics, report, folder)
    atomic_write(folder / "adapted.json", (result.model_dump_json(indent=1) + "\n").encode())
    return result


def compared(without: Metrics, adapted: Metrics) -> str:
    """Return a sentence with metrics without and with adaptation."""
    words = {"auc": "AUC", "accuracy": "accuracy", "calibration_error": "ECE"}
    parts = [f"{word} {_number(without, name)} -> {_number(adapted, name)}" for name, word in words.items()]
    return f"without -> with adaptation: {', '.join(parts)}."


def _number(metrics: Metrics, name: str) -> str:
    value: float | None = getattr(metrics, name)
    return "-" if value is None else f"{value:.3f}"
