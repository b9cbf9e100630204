"""One batch of images to features: the same code for the store and for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import DataError
from schemas.features import FeatureSpec
from stages.device import in_precision
from stages.extract.resize import to_squares
from stages.extract.taps import Tapped, Taps
from stages.lpm.loading import LoadedLpm
from stages.pixels import normalise
from stages.store.quantise import encode, encode_hidden


@dataclass(frozen=True)
class Pixels:
    """One decoded image at the two sizes that the method needs."""

    lpm: NDArray[np.uint8]
    """(S, S, 3), input of the LPM."""
    side: NDArray[np.uint8]
    """(3, s, s), for the side network."""


@dataclass(frozen=True)
class FeatureBatch:
    """Rows of the store, on the CPU."""

    arrays: dict[str, NDArray[Any]]
    """Array name -> (B, ...), as `array_layouts` of the spec has it; without keys: for the side network alone.

    `pooled` holds the class token (or the mean, where there is none) and the mean of the patches, after the final norm;
    it is there where the spec wants it.
    """

    def __len__(self) -> int:
        return len(self.arrays["side"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]


def to_pixels(image: Image.Image, spec: FeatureSpec) -> Pixels:
    """An RGB image as the LPM's square input and as the stored side image, by the spec's resize rule."""
    large, small = to_squares(image, spec)
    return Pixels(large, np.ascontiguousarray(small.transpose(2, 0, 1)))


@torch.inference_mode()
def compute_features(
    lpm: LoadedLpm, spec: FeatureSpec, images: Sequence[Pixels], device: torch.device | str = "cpu"
) -> FeatureBatch:
    """Run the LPM once and keep what the spec says.

    Args:
        lpm: With the model already on `device`.
        spec: What to keep.
        images: From `to_pixels`.
        device: Where the model is.

    Raises:
        DataError: If a feature is not finite in the store's type, or too large for it.
    """
    stacked = torch.from_numpy(np.stack([image.lpm for image in images])).to(device).permute(0, 3, 1, 2)
    pixels = normalise(stacked, spec.lpm.mean, spec.lpm.std)

    def keep(layer: Tapped) -> dict[str, torch.Tensor]:
        # Encoded at once: in a small type the kept tokens of all layers weigh little beside one layer's activations.
        with torch.autocast(pixels.device.type, enabled=False):
            return {**encode(layer.keys[:, None], layer.values[:, None], spec), "indices": layer.indices[:, None]}

    def keep_hidden(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(pixels.device.type, enabled=False):
            return encode_hidden(tokens, spec)

    with Taps(lpm.model, spec, keep, keep_hidden) as taps, in_precision(spec.precision, pixels.device):
        tokens = taps.run(pixels.to(next(lpm.model.parameters()).dtype))
        layers, hidden = taps.take(), taps.take_hidden() or {}
    found = {name: torch.cat([layer[name] for layer in layers], dim=1).cpu().numpy() for name in layers[0]}
    found |= {name: array.cpu().numpy() for name, array in hidden.items()}
    found["indices"] = found["indices"].astype(np.uint16)
    found["side"] = np.stack([image.side for image in images])
    if tokens is not None:
        found["pooled"] = pooled_outputs(tokens.float(), spec).cpu().numpy()
    return FeatureBatch(found)


def pooled_outputs(tokens: torch.Tensor, spec: FeatureSpec) -> torch.Tensor:
    """(B, N, D) after the final norm -> (B, 2, D): class token, mean of the patches.

    Raises:
        DataError: If they are not finite.
    """
    mean = tokens[:, spec.lpm.prefix_tokens :].mean(dim=1)
    pooled = torch.stack([tokens[:, 0] if spec.lpm.has_class_token else mean, mean], dim=1)
    if not bool(torch.isfinite(pooled).all()):
        raise DataError(
            "The pooled outputs of the LPM are not finite.",
            "The weights are damaged, or features.precision has too small a range for this LPM.",
            "Check lpm.weights, or set features.precision to float32.",
        )
    return pooled
