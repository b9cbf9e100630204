"""Corruptions of images for the shift bench: six kinds at five strengths, the same for an image and a seed.

An image is first reduced so that its shorter side is that of the LPM's input, so that a strength means the same at any
resolution. The kinds are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261); the values are ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from schemas.shift import ShiftName

Floats = npt.NDArray[np.float64]

SHIFTS: tuple[ShiftName, ...] = get_args(ShiftName)

VALUES: dict[ShiftName, tuple[float, ...]] = {
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.75, 0.6, 0.45, 0.3, 0.15),
    "blur": (0.004, 0.008, 0.012, 0.018, 0.026),
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "jpeg": (40, 25, 15, 10, 5),
    "downsampling": (0.5, 0.35, 0.25, 0.18, 0.125),
}
"""By strength: added brightness (share of the range), factor of the contrast, deviation of the Gaussian blur (share of
the shorter side), deviation of Gaussian noise (share of the range), JPEG quality, and factor of the size."""


def corrupted(image: Image.Image, shift: ShiftName, strength: int, size: int, image_id: str, seed: int) -> Image.Image:
    """Return a corrupted RGB image.

    Args:
        image: Decoded image, of mode RGB or F.
        shift: Kind.
        strength: From 1 to 5.
        size: Side of the LPM's input, in pixels.
        image_id: Content id of the image, which with the seed determines the noise.
        seed: Seed of the noise.
    """
    reduced = _reduced(image, size)
    value = VALUES[shift][strength - 1]
    if shift == "noise":
        entropy = [seed, int(image_id[:16], 16), strength]
        return _noisy(reduced, value, np.random.default_rng(entropy))
    return _CHANGES[shift](reduced, value)


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """Return the image in RGB with a shorter side of at most `size`."""
    if image.mode != "RGB":
        grey = np.rint(np.asarray(image, np.float64)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey).convert("RGB")
    factor = size / min(image.size)
    if factor >= 1:
        return image
    width, height = (max(size, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _of_pixels(change: Callable[[Floats, float], Floats]) -> Callable[[Image.Image, float], Image.Image]:
    def apply(image: Image.Image, value: float) -> Image.Image:
        return _from_floats(change(np.asarray(image, np.float64), value))

    return apply


def _from_floats(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def _noisy(image: Image.Image, value: float, generator: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    return _from_floats(pixels + 255 * value * generator.standard_normal(pixels.shape))


def _with_contrast(pixels: Floats, value: float) -> Floats:
    mean: Any = pixels.mean(axis=(0, 1), keepdims=True)
    changed: Floats = (pixels - mean) * value + mean
    return changed


def _blurred(image: Image.Image, value: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(value * min(image.size)))


def _as_jpeg(image: Image.Image, value: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(value))
    with Image.open(file) as opened:
        return opened.convert("RGB")


def _downsampled(image: Image.Image, value: float) -> Image.Image:
    small = [max(1, round(side * value)) for side in image.size]
    reduced = image.resize((small[0], small[1]), Image.Resampling.BOX)
    return reduced.resize(image.size, Image.Resampling.BICUBIC)


_CHANGES: dict[ShiftName, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": _of_pixels(lambda pixels, value: pixels + 255 * value),
    "contrast": _of_pixels(_with_contrast),
    "blur": _blurred,
    "jpeg": _as_jpeg,
    "downsampling": _downsampled,
}
