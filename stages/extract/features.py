"""Compute the features of one batch of images, for the store and for prediction alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from schemas.errors import DataError
from schemas.features import FeatureSpec
from stages.device import in_precision
from stages.extract.resize import to_squares
from stages.extract.statistics import TokenStatistics, checked, kept_moments, map_statistics
from stages.extract.taps import Tapped, Taps
from stages.lpm.feature_maps import run_maps
from stages.lpm.loading import LoadedLpm
from stages.pixels import normalise
from stages.store.quantise import encode, encode_hidden


@dataclass(frozen=True)
class Pixels:
    """One decoded image at its two sizes."""

    lpm: NDArray[np.uint8]
    """(S, S, 3), input of the LPM."""
    side: NDArray[np.uint8]
    """(3, s, s), for the side network."""


@dataclass(frozen=True)
class FeatureBatch:
    """Rows of the store, on the CPU."""

    arrays: dict[str, NDArray[Any]]
    """Array name -> (B, ...), as in `array_layouts` of the spec; only `side` for a network that reads nothing else.

    `pooled` holds the class token (the mean, for models without one) and the mean of the patches, after the final norm;
    of an LPM that gives feature maps twice what its classifier reads.
    """

    def __len__(self) -> int:
        return len(self.arrays["side"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]


def to_pixels(image: Image.Image, spec: FeatureSpec) -> Pixels:
    """Resize an RGB image to the LPM's square input and to the stored side image, by the spec's resize rule."""
    large, small = to_squares(image, spec)
    return Pixels(large, np.ascontiguousarray(small.transpose(2, 0, 1)))


@torch.inference_mode()
def compute_features(
    lpm: LoadedLpm, spec: FeatureSpec, images: Sequence[Pixels], device: torch.device | str = "cpu"
) -> FeatureBatch:
    """Run the LPM once and encode the features of the spec.

    Args:
        lpm: Its model is on `device`.
        spec: Gives the arrays and their types.
        images: From `to_pixels`.
        device: Device of the model.

    Raises:
        DataError: If a feature is not finite in the store's type, or too large for it.
    """
    stacked = torch.from_numpy(np.stack([image.lpm for image in images])).to(device).permute(0, 3, 1, 2)
    pixels = normalise(stacked, spec.lpm.mean, spec.lpm.std)
    arrays = (_of_maps if spec.lpm.map_widths else _of_tokens)(lpm.model, spec, pixels)
    arrays["side"] = np.stack([image.side for image in images])
    return FeatureBatch(arrays)


def _of_maps(model: nn.Module, spec: FeatureSpec, pixels: torch.Tensor) -> dict[str, NDArray[Any]]:
    """Compute the pooled outputs and the statistics of feature maps."""
    arrays: dict[str, NDArray[Any]] = {}
    with in_precision(spec.precision, pixels.device):
        found = run_maps(model, pixels.to(next(model.parameters()).dtype))
    if spec.statistics:
        arrays["statistics"] = map_statistics(found.maps).half().cpu().numpy()
    if spec.pooled:
        arrays["pooled"] = _finite(torch.stack([found.pooled.float()] * 2, dim=1)).cpu().numpy()
    return arrays


def _of_tokens(model: nn.Module, spec: FeatureSpec, pixels: torch.Tensor) -> dict[str, NDArray[Any]]:
    """Compute the kept tokens, hidden tokens, statistics and pooled outputs of a plain vision transformer."""
    kept: list[torch.Tensor] = []

    def record(layer: Tapped) -> dict[str, torch.Tensor]:
        # Encoded at once: in a small type the tokens of all layers take little memory next to one layer's activations.
        with torch.autocast(pixels.device.type, enabled=False):
            if spec.statistics:
                kept.extend(kept_moments(tokens) for tokens in (layer.keys, layer.values))
            return {**encode(layer.keys[:, None], layer.values[:, None], spec), "indices": layer.indices[:, None]}

    def record_hidden(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(pixels.device.type, enabled=False):
            return encode_hidden(tokens, spec)

    statistics = TokenStatistics(model, spec) if spec.statistics else None
    with (
        statistics or nullcontext(),
        Taps(model, spec, record, record_hidden) as taps,
        in_precision(spec.precision, pixels.device),
    ):
        tokens = taps.run(pixels.to(next(model.parameters()).dtype))
        layers, hidden = taps.take(), taps.take_hidden() or {}
        moments = [] if statistics is None else [statistics.take(), *map(checked, kept)]
    names = list(layers[0]) if layers else []
    arrays = {name: torch.cat([layer[name] for layer in layers], dim=1).cpu().numpy() for name in names}
    arrays |= {name: array.cpu().numpy() for name, array in hidden.items()}
    if layers:
        arrays["indices"] = arrays["indices"].astype(np.uint16)
    if moments:
        arrays["statistics"] = torch.cat(moments, dim=1).half().cpu().numpy()
    if tokens is not None and spec.pooled:
        arrays["pooled"] = pooled_outputs(tokens.float(), spec).cpu().numpy()
    return arrays


def pooled_outputs(tokens: torch.Tensor, spec: FeatureSpec) -> torch.Tensor:
    """Pool tokens after the final norm: (B, N, D) -> (B, 2, D), class token and mean of the patches.

    Raises:
        DataError: If they are not finite.
    """
    mean = tokens[:, spec.lpm.prefix_tokens :].mean(dim=1)
    return _finite(torch.stack([tokens[:, 0] if spec.lpm.has_class_token else mean, mean], dim=1))


def _finite(pooled: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(pooled).all()):
        raise DataError(
            "The pooled outputs of the LPM are not finite.",
            "The weights are damaged, or features.precision has too small a range for this LPM.",
            "Check lpm.weights, or set features.precision to float32.",
        )
    return pooled
