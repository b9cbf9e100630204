"""Predict the images of a study that have no label, from their cached features."""

from __future__ import annotations

from pathlib import Path

import torch

from schemas.errors import EvaluationError
from schemas.results import BundleSpec, Prediction
from stages.evaluate.evaluator import check_fit, open_source, row_probabilities
from stages.predict.classifier import as_row
from stages.train.bundle import load_bundle
from stages.train.inputs import StudyFiles


def predict_unlabelled(
    files: StudyFiles, bundle_dir: Path, device: torch.device | str = "cpu"
) -> tuple[list[Prediction], BundleSpec]:
    """Predict all images of the manifest without a label (`data.unlabelled: allow`), in the order of their paths.

    Args:
        files: Manifest, LPM and features of the study.
        bundle_dir: From `train`.
        device: Where the model computes.

    Returns:
        A row per image, with the path relative to `data.images`; and what is known of the model.

    Raises:
        EvaluationError: All images have a label, or the model's outputs are not finite.
        FptError: As `stages.evaluate.evaluator.evaluate`.
    """
    bundle, manifest = load_bundle(bundle_dir, device), files.manifest
    check_fit(bundle.spec, manifest)
    if not manifest.unlabelled:
        raise EvaluationError(
            "The study has no images without a label.",
            "The manifest lists them only if data.unlabelled is allow.",
            "Set data.unlabelled: allow in params.yaml and run `dvc repro`; or name the images to predict.",
        )
    with open_source(bundle, files) as source:
        found = row_probabilities(bundle, source, manifest.unlabelled)
    rows = [as_row(row.path, p, bundle.spec) for row, p in zip(manifest.unlabelled, found, strict=True)]
    return rows, bundle.spec
