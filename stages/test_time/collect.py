"""Statistics of source images that need the LPM: computed when they are first asked for, from training images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from schemas.errors import BundleError
from schemas.methods import model_inputs
from schemas.test_time import SOURCE_KINDS, Adapt
from stages.lpm.loading import LoadedLpm
from stages.manifest import fitted_sha256
from stages.methods.batch import Batch, array_names, required
from stages.pixels import to_size
from stages.store.memory_rows import RowSource
from stages.test_time.targets import LpmTarget, open_target
from stages.train.bundle import Bundle
from stages.train.inputs import StudyFiles, open_arrays
from stages.train.source_statistics import Kind, Moments, add_source, model_moments, moments_of, read_source

IMAGES = 32
"""Training images that pass through the LPM; as many suffice for FOA as published."""
CHUNK = 8
"""Images of a pass."""


def ensure_source(
    name: Adapt, bundle_dir: Path, bundle: Bundle, lpm: LoadedLpm | None, files: StudyFiles | None
) -> Mapping[Kind, Moments]:
    """Return the statistics that an adaptation needs; what a bundle lacks is computed, and written next to it.

    Args:
        name: Kind of the adaptation.
        bundle_dir: Folder of the bundle.
        bundle: Loaded, with the weights of the LPM where it needs them.
        lpm: Frozen LPM, where `targets.runs_lpm`.
        files: Study that the bundle was trained in; None: unknown.

    Raises:
        BundleError: Statistics are missing and the study is not at hand, or has other training images.
        FptError: As reading the store or the images.
    """
    found = read_source(bundle_dir, bundle.spec.weights_sha256)
    missing = [kind for kind in SOURCE_KINDS[name] if kind not in found]
    if not missing:
        return found
    if files is None or files.manifest is None or not _same_images(bundle, files):
        raise BundleError(
            f"The model has no statistics of source images that {name} needs: {', '.join(missing)}.",
            "They are computed from 32 training images, and the study of the model is not here, or was prepared again.",
            f"Run `fpt evaluate --adapt {name}` in the study of the model once: it writes the folder "
            f"{bundle_dir.name}-source next to the model, which belongs there. Or train again with this version.",
        )
    added = _computed(missing, bundle, lpm, files)
    add_source(bundle_dir, bundle.spec.weights_sha256, added)
    return {**found, **added}


def _same_images(bundle: Bundle, files: StudyFiles) -> bool:
    """Whether the training images of a study are those of the model, as far as it is recorded."""
    recorded = bundle.spec.fitted_sha256
    return recorded is None or recorded == fitted_sha256(files.manifest)


@torch.inference_mode()
def _computed(missing: list[Kind], bundle: Bundle, lpm: LoadedLpm | None, files: StudyFiles) -> dict[Kind, Moments]:
    """Compute statistics of the first training images in the order of their ids, which are digests: a random draw."""
    ids = sorted({row.id for row in files.manifest.of("train")})[:IMAGES]
    added: dict[Kind, Moments] = {}
    if "norms" in missing:
        added["norms"] = _norms(LpmTarget(bundle, lpm), bundle, files, ids)
    if {"vectors", "activations"} & set(missing):
        added |= {kind: one for kind, one in _passed(bundle, lpm, files, ids).items() if kind in missing}
    return added


def _passed(bundle: Bundle, lpm: LoadedLpm | None, files: StudyFiles, ids: list[str]) -> dict[Kind, Moments]:
    """Return the statistics of what the head reads, and of class tokens where prompts can be searched."""
    cached = array_names(model_inputs(bundle.spec.network))
    if lpm is None and not bundle.network.needs_lpm and getattr(bundle.network, "lpm", None) is None:
        return model_moments(bundle.network, _batches(bundle, files, ids, cached))
    target = open_target(bundle, lpm)
    passed = [target.run(target.begin(batch), None) for batch in _batches(bundle, files, ids, target.reads)]
    return {
        "activations": moments_of(activations for activations, _ in passed),
        "vectors": moments_of(vectors for _, vectors in passed),
    }


def _norms(target: LpmTarget, bundle: Bundle, files: StudyFiles, ids: list[str]) -> Moments:
    """Return mean and variance (K, D) over the patch tokens of all images."""
    found = [
        target.norms(required(batch.image, "image")) for batch in _batches(bundle, files, ids, target.reads, size=1)
    ]
    means = torch.stack([mean for mean, _ in found]).cpu().double()
    variances = torch.stack([variance for _, variance in found]).cpu().double()
    # Images have equally many tokens: the variance of all is the mean variance and the variance of the means.
    total = variances.mean(dim=0) + means.var(dim=0, correction=0)
    return Moments(means.mean(dim=0).float(), total.float(), len(ids))


def _batches(
    bundle: Bundle, files: StudyFiles, ids: list[str], names: frozenset[str], size: int = CHUNK
) -> Iterator[Batch]:
    """Yield prepared batches of training images."""
    with open_arrays(files, bundle.spec.features, names) as source:
        for start in range(0, len(ids), size):
            batch = read_batch(source, ids[start : start + size], names, bundle.spec.network.side_size)
            yield batch.to(bundle.device).prepared(bundle.spec.features)


def read_batch(source: RowSource, ids: list[str], names: frozenset[str], side_size: int) -> Batch:
    """Read rows as a batch, un-augmented."""
    arrays = source.read_rows(source.locate(ids), ids, [name for name in source.layouts if name in names])
    return as_batch(arrays, names, side_size)


def as_batch(arrays: Mapping[str, NDArray[Any]], names: frozenset[str], side_size: int) -> Batch:
    """Return the named arrays of some images as a batch, with the small images at the side network's size."""
    read = {name: array for name, array in arrays.items() if name in names}
    count = len(next(iter(read.values())))
    side = to_size(torch.from_numpy(read["side"]), side_size) if "side" in read else None
    image = torch.from_numpy(read["image"]) if "image" in read else None
    return Batch.of(read, torch.zeros(count, dtype=torch.int64), side, image)
