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
from stages.extract.lpm import LoadedLpm
from stages.extract.taps import Taps

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Pixels:
    """One decoded image at the two sizes that the method needs."""

    lpm: NDArray[np.uint8]
    """(S, S, 3), input of the LPM."""
    side: NDArray[np.uint8]
    """(3, s, s), for the side network."""


@dataclass(frozen=True)
class FeatureBatch:
    """Rows of the store, by array name; on the CPU."""

    keys: NDArray[np.floating]
    """(B, L, H, T, d) in the store's type."""
    values: NDArray[np.floating]
    """(B, L, H, T, d) in the store's type."""
    indices: NDArray[np.uint16]
    """(B, L, H, T)."""
    pooled: NDArray[np.float32]
    """(B, 2, D): class token (or the mean, where there is none) and mean of the patches, after the final norm."""
    side: NDArray[np.uint8]
    """(B, 3, s, s)."""

    def __len__(self) -> int:
        return len(self.keys)


def to_pixels(image: Image.Image, spec: FeatureSpec) -> Pixels:
    """Squash an RGB image to the LPM's square input and to the stored side image."""
    lpm, filter_ = spec.lpm, FILTERS[spec.lpm.interpolation]
    large = np.asarray(image.resize((lpm.image_size, lpm.image_size), filter_))
    small = np.asarray(image.resize((spec.side_image_size, spec.side_image_size), filter_))
    return Pixels(large, np.ascontiguousarray(small.transpose(2, 0, 1)))


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32, (x / 255 - mean) / std per channel."""
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - shift) / scale


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
        DataError: If a feature is not finite in the store's type.
    """
    stacked = torch.from_numpy(np.stack([image.lpm for image in images])).to(device).permute(0, 3, 1, 2)
    with Taps(lpm.model, spec) as taps:
        model: Any = lpm.model
        tokens: torch.Tensor = model.forward_features(normalise(stacked, spec.lpm.mean, spec.lpm.std))
        layers = taps.take()
    kind = DTYPES[spec.dtype]
    keys = torch.stack([layer.keys for layer in layers], dim=1).to(kind)
    values = torch.stack([layer.values for layer in layers], dim=1).to(kind)
    indices = torch.stack([layer.indices for layer in layers], dim=1)
    mean = tokens[:, spec.lpm.prefix_tokens :].mean(dim=1)
    pooled = torch.stack([tokens[:, 0] if spec.lpm.has_class_token else mean, mean], dim=1).float()
    for name, tensor in (("keys", keys), ("values", values), ("pooled outputs", pooled)):
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"The {name} of the LPM are not finite in {spec.dtype}.",
                "Its activations exceed the range of the type, or the weights are damaged.",
                "Set features.dtype to float32, or check lpm.weights.",
            )
    return FeatureBatch(
        keys=keys.cpu().numpy(),
        values=values.cpu().numpy(),
        indices=indices.cpu().numpy().astype(np.uint16),
        pooled=pooled.cpu().numpy(),
        side=np.stack([image.side for image in images]),
    )
