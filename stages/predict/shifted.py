"""Predictions of several trained models on shifted images: one pass of the LPM per image, shared by all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from schemas.data_settings import DataSettings
from schemas.errors import EvaluationError
from schemas.features import FeatureSpec
from schemas.manifest import ManifestRow
from schemas.methods import model_inputs
from schemas.settings import LpmSettings
from schemas.shift import Condition
from schemas.specs import Inputs
from schemas.test_time import AdaptOptions
from stages.extract.features import Pixels, compute_features, to_pixels
from stages.lpm.loading import LoadedLpm
from stages.lpm.matching import load_matching
from stages.predict.classifier import checked_probabilities, needed_features, pixel_arrays
from stages.progress import Progress
from stages.study_images import within_limits
from stages.test_time.adapters import Adapter
from stages.test_time.collect import as_batch
from stages.test_time.corruptions import SHIFTS, corrupted
from stages.test_time.stream import AdaptContext, in_batches, open_for, shuffled
from stages.train.bundle import Bundle
from stages.train.infer import feature_logits

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """A model to predict with, as it is or adapted."""

    bundle: Bundle
    """On its device."""
    context: AdaptContext
    """Where its bundle, the LPM and the study are."""
    adapt: AdaptOptions | None
    """Adaptation; None: none."""


@dataclass
class ShiftedImages:
    """Test images of a study, and the LPM that is loaded once for all models."""

    folder: Path
    """Folder of the images."""
    data: DataSettings
    """Limits of an image's size."""
    lpm: LpmSettings | None
    """Name and weights of the LPM; None: the hub."""
    root: Path
    """Folder that relative paths of the weights start at."""
    device: torch.device
    """Where everything is computed."""
    batch_size: int
    """Images of a pass of the LPM that computes features."""
    seed: int
    """Seed of the noise, and of the order of the images."""
    passes: int = 0
    """Images that passed through the LPM for features, so far."""
    _loaded: dict[str, LoadedLpm] = field(default_factory=dict)

    def probabilities(
        self,
        entries: Sequence[Entry],
        rows: Sequence[ManifestRow],
        condition: Condition,
        batch: int,
        progress: Progress | None = None,
    ) -> list[Floats]:
        """Compute the probabilities (n, C) of rows under a condition by every entry.

        All entries have features of the same images by the same LPM. Each image is read, corrupted and passed through
        the LPM once.

        Args:
            entries: Models.
            rows: Of test images, each image once.
            condition: Corruption.
            batch: Images of a batch.
            progress: Called with (images done, images).

        Raises:
            ImageError: An image cannot be read.
            FptError: As opening an adaptation.
        """
        spec = _common_features([entry.bundle for entry in entries])
        for entry in entries:
            if entry.bundle.network.needs_lpm:
                entry.bundle.network.use_lpm(self.load(spec).model)
        adapters = [self._adapter(entry, spec) for entry in entries]
        found: list[list[Floats]] = [[] for _ in entries]
        order = shuffled(len(rows), self.seed)
        for positions in in_batches(order, batch):
            pixels = [self._pixels(rows[at], condition, spec) for at in positions]
            arrays = self._arrays(pixels, spec, entries)
            for number, (entry, adapter) in enumerate(zip(entries, adapters, strict=True)):
                found[number].append(_predicted(entry, adapter, arrays))
            if progress is not None:
                progress(sum(map(len, found[0])), len(rows))
        back = np.argsort(order)
        return [np.concatenate(parts)[back] for parts in found]

    def load(self, spec: FeatureSpec) -> LoadedLpm:
        """Return the LPM of a spec, loaded once."""
        if spec.weights_sha256 not in self._loaded:
            self._loaded[spec.weights_sha256] = load_matching(spec, self.lpm, self.root, self.device)
        return self._loaded[spec.weights_sha256]

    def _adapter(self, entry: Entry, spec: FeatureSpec) -> Adapter | None:
        if entry.adapt is None:
            return None
        return open_for(entry.bundle, entry.adapt, entry.context, self.load(spec))

    def _pixels(self, row: ManifestRow, condition: Condition, spec: FeatureSpec) -> Pixels:
        with within_limits(self.folder / row.path, self.data, spec.rendering) as image:
            for kind in SHIFTS:
                if kind == condition.shift:
                    size = spec.lpm.image_size
                    changed = corrupted(image, kind, condition.strength, size, row.id, self.seed)
                    return to_pixels(changed, spec)
            return to_pixels(image, spec)

    def _arrays(
        self, pixels: Sequence[Pixels], spec: FeatureSpec, entries: Sequence[Entry]
    ) -> Mapping[str, npt.NDArray[np.generic]]:
        """Compute what all models read: features by one pass of the LPM, unless all of them read pixels."""
        inputs: Inputs = frozenset().union(*(model_inputs(entry.bundle.spec.network) for entry in entries))
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        if inputs - {"image", "side"}:
            chunks = []
            for start in range(0, len(pixels), self.batch_size):
                chunk = pixels[start : start + self.batch_size]
                chunks.append(compute_features(self.load(spec), spec, chunk, self.device).arrays)
                self.passes += len(chunk)
            arrays |= {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        return arrays | pixel_arrays(pixels, frozenset({"image", "side"}))


def _predicted(
    entry: Entry,
    adapter: Adapter | None,
    arrays: Mapping[str, npt.NDArray[np.generic]],
) -> Floats:
    spec = entry.bundle.spec
    if adapter is None:
        return checked_probabilities(feature_logits(entry.bundle, arrays), spec.task)
    return checked_probabilities(adapter.step(as_batch(arrays, adapter.reads, spec.network.side_size)), spec.task)


def _common_features(bundles: Sequence[Bundle]) -> FeatureSpec:
    """Return features that serve all models: those of the one that reads most of them.

    Raises:
        EvaluationError: The models were trained on different features of the LPM.
    """
    specs = [needed_features(bundle.spec) for bundle in bundles]
    cached = [
        spec
        for spec, bundle in zip(specs, bundles, strict=True)
        if model_inputs(bundle.spec.network) - {"image", "side"}
    ] or specs
    statistics = any(spec.statistics for spec in cached)
    hidden = next((spec.hidden for spec in cached if spec.hidden is not None), None)
    common = cached[0].model_copy(update={"statistics": statistics, "hidden": hidden})
    alike = {"statistics": statistics, "hidden": hidden}
    if any(spec.model_copy(update=alike) != common for spec in cached) or any(
        (spec.lpm, spec.weights_sha256, spec.resize) != (common.lpm, common.weights_sha256, common.resize)
        for spec in specs
    ):
        raise EvaluationError(
            "The models were trained on different features of the LPM.",
            "The features were extracted again, with other settings, after some of them were trained.",
            "Run `fpt bench` with another --output, so that all of them are trained on the same features.",
        )
    return common
