"""From image files to classes: the LPM's features, the side network, one row an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from schemas.errors import BundleError, CacheMismatchError, EvaluationError, ImageError, WeightsError
from schemas.features import FEATURE_VERSION, FeatureSpec
from schemas.results import Prediction
from schemas.settings import DataSettings, LpmSettings
from stages.device import pick_device
from stages.evaluate.run import probabilities
from stages.extract.features import FeatureBatch, Pixels, compute_features, to_pixels
from stages.extract.lpm import LoadedLpm, describe_lpm, load_lpm
from stages.images import read_image
from stages.progress import Progress
from stages.tasks import decide, texts
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import feature_logits


def predict(
    bundle_dir: Path,
    images: Sequence[Path],
    lpm: LpmSettings | None,
    root: Path,
    device: torch.device | str = "auto",
    *,
    batch_size: int = 4,
    data: DataSettings | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Classify image files.

    An image that cannot be used gives a row with an error in its place: one broken file among thousands must neither
    stop the others nor go unsaid.

    Args:
        bundle_dir: From `train`.
        images: Files; each gives one row, in this order.
        lpm: Where the LPM's weights are; None: the hub, for the model that the bundle names.
        root: Folder that a relative `lpm.weights` or `local-dir:` starts at.
        device: Of both networks; "auto": CUDA, else MPS, else the CPU.
        batch_size: Images per forward pass.
        data: Limits of an image's size, and the task where it is set; None: the defaults, whatever the task.
        progress: Called after each batch with (done, total) images.

    Raises:
        BundleError: The bundle is missing or damaged, or of another task than `data` says.
        CacheMismatchError: The LPM has another shape or preprocessing than in training.
        WeightsError: The weights are missing, or are not those that the bundle was trained with.
        EvaluationError: The model's outputs are not finite.
    """
    place = pick_device(device) if isinstance(device, str) else device
    bundle = load_bundle(bundle_dir, place)
    # A model alone is enough: only who states a task can contradict it.
    if data is not None and "task" in data.model_fields_set and data.task != bundle.spec.task:
        raise BundleError(
            f"The model was trained for {bundle.spec.task}; data.task is {data.task}.",
            "The settings are of another study, or changed after the model was trained.",
            f"Set data.task to {bundle.spec.task}, or run `fpt train` again.",
        )
    # The side network alone needs no features: no LPM is loaded for it.
    model = None if bundle.spec.network.method == "side" else _load(bundle.spec.features, lpm, root, place)
    rows: list[Prediction] = []
    waiting = iter(images)
    while paths := list(islice(waiting, batch_size)):
        rows += _predict_batch(bundle, model, paths, data or DataSettings(), place)
        if progress is not None:
            progress(len(rows), len(images))
    return rows


def _load(spec: FeatureSpec, lpm: LpmSettings | None, root: Path, device: torch.device) -> LoadedLpm:
    """The LPM on its device, refused unless it gives the features that the bundle was trained on."""
    source = lpm or LpmSettings(name=spec.lpm.name)
    info = describe_lpm(source.name, spec.lpm.image_size, root)
    if differing := spec.differing(spec.model_copy(update={"lpm": info, "feature_version": FEATURE_VERSION})):
        raise CacheMismatchError(
            f"The model was trained on features of {spec.lpm.name}, which {source.name} does not give.",
            differing,
            "lpm.name is another model, or this version of timm describes it differently.",
            f"Set lpm.name to {'the local-dir: of that model' if 'local-dir:' in spec.lpm.name else spec.lpm.name}.",
        )
    loaded = load_lpm(source, spec.lpm.image_size, root)
    if loaded.weights_sha256 != spec.weights_sha256:
        raise WeightsError(
            f"The weights of {spec.lpm.name} have the sha256 {loaded.weights_sha256}, "
            f"the model was trained with {spec.weights_sha256}.",
            f"lpm.weights ({source.weights}) is another file than in training.",
            "Set lpm.weights to the file that `fpt extract` used.",
        )
    loaded.model.to(device)
    return loaded


def _predict_batch(
    bundle: Bundle, model: LoadedLpm | None, paths: Sequence[Path], data: DataSettings, device: torch.device
) -> Iterator[Prediction]:
    spec = bundle.spec.features
    pixels: dict[int, Pixels] = {}
    errors: dict[int, str] = {}
    for position, path in enumerate(paths):
        try:
            image = read_image(path, max_pixels=data.max_pixels, min_side=data.min_side)
            pixels[position] = to_pixels(image, spec)
        except ImageError as error:
            errors[position] = error.reason
    found: dict[int, tuple[str, dict[str, float]]] = {}
    if pixels:
        batch = list(pixels.values())
        features = _side_images(batch) if model is None else compute_features(model, spec, batch, device)
        p = probabilities(feature_logits(bundle, features), bundle.spec.task)
        if not np.isfinite(p).all():
            raise EvaluationError(
                "The outputs of the model are not finite.",
                "Its weights are damaged, or training diverged.",
                "Train again, with a lower rate: fpt train --set train.lr=1e-4",
            )
        names = bundle.spec.classes
        said = texts(decide(p, bundle.spec.task), names)
        shares = (dict(zip(names, row.tolist(), strict=True)) for row in p)
        found = dict(zip(pixels, zip(said, shares, strict=True), strict=True))
    for position, path in enumerate(paths):
        predicted, probability = found.get(position, (None, None))
        yield Prediction(
            path=str(path),
            predicted=predicted,
            probabilities=probability,
            error=errors.get(position),
        )


def _side_images(pixels: Sequence[Pixels]) -> FeatureBatch:
    """A batch for a network that reads nothing but the side image."""
    return FeatureBatch({"side": np.stack([image.side for image in pixels])})
