"""Measure how far apart the classes are in a space of features, without training anything on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from schemas.manifest import Manifest
from schemas.sweeps import Separation
from stages.evaluate.effective_rank import effective_rank
from stages.evaluate.evaluator import open_source
from stages.tasks import label_array
from stages.train.bundle import load_bundle
from stages.train.infer import source_features
from stages.train.inputs import StudyFiles, open_arrays

MOST = 2000
"""Images of which the silhouette is computed, which compares all pairs; of more, this many are drawn."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def separate(features: npt.NDArray[np.floating], labels: Labels) -> Separation:
    """Measure features.

    Args:
        features: (n, D).
        labels: (n,) class indices; multi-label (n, C) zeros and ones: then silhouette and margin are means over labels,
            of images with against those without it.
    """
    x = np.asarray(features, np.float64)
    partitions = list(labels.T) if labels.ndim == 2 else [labels]
    return Separation(
        silhouette=_mean([silhouette(x, one) for one in partitions]),
        margin=_mean([centroid_margin(x, one) for one in partitions]),
        effective_rank=effective_rank(torch.from_numpy(x)) or None,
    )


def silhouette(x: Floats, labels: Labels) -> float | None:
    """Return the mean silhouette coefficient of x (n, D) under labels (n,); None unless 2 <= classes < n."""
    # Imported late: 0.5 s that an evaluation does not need.
    from sklearn.metrics import silhouette_score

    if len(x) > MOST:
        chosen = np.sort(np.random.default_rng(0).choice(len(x), MOST, replace=False))
        x, labels = x[chosen], labels[chosen]
    return float(silhouette_score(x, labels)) if 2 <= len(np.unique(labels)) < len(x) else None


def centroid_margin(x: Floats, labels: Labels) -> float | None:
    """Return the mean over images of (b - a) / (a + b).

    a is the distance to the mean of the other images of the class, b that to the nearest mean of another class. Images
    that are the only ones of their class have no a, and are left out.
    """
    classes, index = np.unique(labels, return_inverse=True)
    counts = np.bincount(index)
    if len(classes) < 2 or counts.max() < 2:
        return None
    sums = np.zeros((len(classes), x.shape[1]))
    np.add.at(sums, index, x)
    kept = np.flatnonzero(counts[index] > 1)
    x, index = x[kept], index[kept]
    own = np.linalg.norm(x - (sums[index] - x) / (counts[index] - 1)[:, None], axis=1)
    distances = np.stack([np.linalg.norm(x - mean, axis=1) for mean in sums / counts[:, None]], axis=1)
    distances[np.arange(len(x)), index] = np.inf
    other = distances.min(axis=1)
    total = own + other
    return float(np.divide(other - own, total, out=np.zeros_like(total), where=total > 0).mean())


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def separation_of_model(files: StudyFiles, bundle_dir: Path, device: torch.device | str) -> Separation | None:
    """Measure the features of the test images in the LPM as a trained model adapts it; None if it does not.

    Raises:
        FptError: As `evaluate`.
    """
    bundle = load_bundle(bundle_dir, device)
    ids, labels = _test_images(files.manifest)
    with open_source(bundle, files) as source:
        features = source_features(bundle, source, ids)
    return None if features is None else separate(features.numpy(), labels)


def separation_of_lpm(files: StudyFiles) -> Separation | None:
    """Measure the cached pooled outputs of the test images, which the head of the frozen LPM would read.

    They are those before a norm of the pooled output (`fc_norm`), which a few LPMs have.

    Returns:
        None if no pooled outputs are cached.
    """
    receipt = files.receipt
    if receipt is None or not receipt.spec.pooled:
        return None
    # Imported late: only this function needs code of the LPM.
    from stages.lpm.catalogue import build_on_meta

    ids, labels = _test_images(files.manifest)
    with open_arrays(files, receipt.spec, frozenset({"pooled"})) as store:
        pooled = store.read_rows(store.locate(ids), ids, ["pooled"])["pooled"]
    lpm: Any = build_on_meta(files.weights_source.name, 2, files.root, img_size=files.lpm.image_size)
    return separate(pooled[:, 1 if lpm.global_pool == "avg" else 0], labels)


def _test_images(manifest: Manifest) -> tuple[list[str], Labels]:
    """Return the ids of the test images, each once, and their labels."""
    rows = {row.id: row for row in manifest.of("test")}
    return list(rows), label_array([row.label for row in rows.values()], manifest.classes, manifest.task)
