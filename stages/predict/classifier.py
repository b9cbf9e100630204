"""From image files to classes: the LPM's features, the side network, one row per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from schemas.data_settings import DataSettings
from schemas.errors import BundleError, EvaluationError, ImageError
from schemas.features import FeatureSpec
from schemas.methods import model_inputs
from schemas.results import BundleSpec, Prediction
from schemas.settings import LpmSettings
from schemas.specs import Inputs
from schemas.tasks import Task
from stages.extract.features import Pixels, compute_features, to_pixels
from stages.images import rgb_image
from stages.lpm.loading import LoadedLpm
from stages.lpm.matching import load_matching
from stages.methods.batch import IMAGE
from stages.progress import Progress
from stages.scores import probabilities
from stages.study_images import within_limits
from stages.tasks import decide, texts
from stages.train.bundle import Bundle
from stages.train.infer import feature_logits


@dataclass(frozen=True)
class Classifier:
    """A bundle together with the LPM whose features it reads, ready for images."""

    bundle: Bundle
    """On `device`."""
    lpm: LoadedLpm | None
    """On `device`; None where the model reads images and no features."""
    data: DataSettings
    """Limits of an image's size."""
    device: torch.device
    """Device of both networks."""

    def probabilities(
        self, images: Sequence[Path | Image.Image], batch_size: int, progress: Progress | None = None
    ) -> Iterator[npt.NDArray[np.float32] | ImageError]:
        """(C,) probabilities of each file or image in memory, or why it cannot be used; in the order of `images`.

        Raises:
            EvaluationError: The model's outputs are not finite.
        """
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            yield from self._batch(batch)
            if progress is not None:
                progress(start + len(batch), len(images))

    def _batch(self, images: Sequence[Path | Image.Image]) -> list[npt.NDArray[np.float32] | ImageError]:
        read = [self.pixels(image) for image in images]
        pixels = [one for one in read if isinstance(one, Pixels)]
        found: Iterator[npt.NDArray[np.float32]] = iter(())
        if pixels:
            found = iter(checked_probabilities(feature_logits(self.bundle, self.arrays(pixels)), self.bundle.spec.task))
        return [next(found) if isinstance(one, Pixels) else one for one in read]

    def arrays(self, pixels: Sequence[Pixels]) -> dict[str, npt.NDArray[Any]]:
        """Compute what the model reads of images, by array name: features by one pass of the LPM, or pixels."""
        spec = self.bundle.spec
        if self.lpm is None:
            return pixel_arrays(pixels, model_inputs(spec.network))
        return compute_features(self.lpm, needed_features(spec), pixels, self.device).arrays

    def pixels(self, image: Path | Image.Image) -> Pixels | ImageError:
        """Decode and resize an image, or return why it cannot be used."""
        try:
            with self._decoded(image) as decoded:
                return to_pixels(decoded, needed_features(self.bundle.spec))
        except ImageError as error:
            return error

    def _decoded(self, image: Path | Image.Image) -> AbstractContextManager[Image.Image]:
        """RGB pixels within a block."""
        rendering = self.bundle.spec.features.rendering
        if not isinstance(image, Image.Image):
            return within_limits(image, self.data, rendering)
        most, least = self.data.max_pixels, self.data.min_side
        return nullcontext(rgb_image(image, "image", max_pixels=most, min_side=least, rendering=rendering))


def as_row(
    path: str,
    p: npt.NDArray[np.float32] | ImageError,
    spec: BundleSpec,
    adapted: npt.NDArray[np.float32] | None = None,
) -> Prediction:
    """Return the row of one image: its classes, or the reason why it cannot be used.

    Args:
        path: As it was given.
        p: From `Classifier.probabilities`.
        spec: Of the model.
        adapted: Probabilities with adaptation at test time; None: without it.
    """
    if isinstance(p, ImageError):
        return Prediction(path=path, predicted=None, probabilities=None, error=p.reason)
    predicted, shares = _named(p, spec)
    if adapted is None:
        return Prediction(path=path, predicted=predicted, probabilities=shares, error=None)
    adapted_predicted, adapted_shares = _named(adapted, spec)
    return Prediction(
        path=path,
        predicted=predicted,
        probabilities=shares,
        error=None,
        adapted_predicted=adapted_predicted,
        adapted_probabilities=adapted_shares,
    )


def _named(p: npt.NDArray[np.float32], spec: BundleSpec) -> tuple[str, dict[str, float]]:
    """Return predicted class, and class -> probability."""
    return texts(decide(p[None], spec.task), spec.classes)[0], dict(zip(spec.classes, p.tolist(), strict=True))


def check_task(spec: BundleSpec, data: DataSettings | None) -> None:
    """Refuse settings that state another task than that of the bundle; without a stated task the bundle decides.

    Raises:
        BundleError: The tasks differ.
    """
    if data is not None and "task" in data.model_fields_set and data.task != spec.task:
        raise BundleError(
            f"The model was trained for {spec.task}; data.task is {data.task}.",
            "The settings are of another study, or changed after the model was trained.",
            f"Set data.task to {spec.task}, or run `fpt train` again.",
        )


def load_classifier(bundle: Bundle, lpm: LpmSettings | None, root: Path, data: DataSettings) -> Classifier:
    """Load the LPM that a bundle needs; none where it reads only the side image.

    Raises:
        CacheMismatchError: The LPM has another shape or preprocessing than in training.
        WeightsError: The weights are missing, or are not those that the bundle was trained with.
    """
    inputs, spec = model_inputs(bundle.spec.network), bundle.spec.features
    if inputs == {"side"}:
        return Classifier(bundle, None, data, bundle.device)
    loaded = load_matching(spec, lpm, root, bundle.device)
    if bundle.network.needs_lpm:
        bundle.network.use_lpm(loaded.model)
    if "image" in inputs:
        return Classifier(bundle, None, data, bundle.device)
    return Classifier(bundle, loaded, data, bundle.device)


def checked_probabilities(logits: torch.Tensor, task: Task) -> npt.NDArray[np.float32]:
    """Return probabilities (B, C) of logits, in single precision like those of an evaluation.

    Raises:
        EvaluationError: They are not finite.
    """
    p: npt.NDArray[np.float32] = probabilities(logits, task).float().numpy()
    if not np.isfinite(p).all():
        raise EvaluationError(
            "The outputs of the model are not finite.",
            "Its weights are damaged, or training diverged.",
            "Train again, with a lower rate: fpt train --set train.lr=1e-4",
        )
    return p


def needed_features(spec: BundleSpec) -> FeatureSpec:
    """Return the features without the arrays that the model does not read and that no other array depends on."""
    inputs = model_inputs(spec.network)
    unread = {name: value for name, value in (("statistics", False), ("hidden", None)) if name not in inputs}
    return spec.features.model_copy(update=unread)


def pixel_arrays(pixels: Sequence[Pixels], inputs: Inputs) -> dict[str, npt.NDArray[np.uint8]]:
    """Arrays for a model that reads pixels and no features."""
    arrays = {}
    if "side" in inputs:
        arrays["side"] = np.stack([image.side for image in pixels])
    if "image" in inputs:
        arrays[IMAGE] = np.ascontiguousarray(np.stack([image.lpm for image in pixels]).transpose(0, 3, 1, 2))
    return arrays
