"""The geometry of stage one: an image of any shape to the LPM's square input, and to the small side image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.features import FeatureSpec

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_SAMPLE = 32
"""Side of a grid of sampled pixels, which identifies most colour photographs before all pixels are compared."""


def to_squares(image: Image.Image, spec: FeatureSpec) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Resize an image to the size of the LPM and to that of the side image, both by `spec.resize`.

    Modes are those of `stages.images.read_image`; grey of mode F is rounded to 8 bits only after it is resized.

    - squash: both sides are scaled to the square; the aspect ratio is lost, no pixel is.
    - letterbox: the aspect ratio stays, the image is centred, and the rest is filled with `spec.lpm.mean`.

    Returns:
        (S, S, 3) and (s, s, 3), uint8.
    """
    source = _one_channel(image) or image
    return _square(source, spec.lpm.image_size, spec), _square(source, spec.side_image_size, spec)


def to_lpm_square(image: Image.Image, spec: FeatureSpec) -> NDArray[np.uint8]:
    """Resize an RGB image as `to_squares`, only to the size of the LPM: (S, S, 3), uint8."""
    return _square(_one_channel(image) or image, spec.lpm.image_size, spec)


def without_padding(image: Image.Image, spec: FeatureSpec) -> NDArray[np.uint8]:
    """Resize an RGB image as for the LPM, but leave out the padding of a letterbox.

    Returns:
        (h, w), if the three channels are identical, else (h, w, 3); uint8, h and w at most `spec.lpm.image_size`.
    """
    return _resized(_one_channel(image) or image, spec.lpm.image_size, spec)


def inner_box(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """Return the place of a letterboxed image in its square: left, top, width and height, in pixels of the square."""
    longest = max(width, height)
    inner = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
    return (side - inner[0]) // 2, (side - inner[1]) // 2, *inner


def _box(image: Image.Image, side: int, spec: FeatureSpec) -> tuple[int, int, int, int]:
    return inner_box(*image.size, side) if spec.resize == "letterbox" else (0, 0, side, side)


def _resized(image: Image.Image, side: int, spec: FeatureSpec) -> NDArray[np.uint8]:
    resized = np.asarray(image.resize(_box(image, side, spec)[2:], FILTERS[spec.resize_filter]))
    # Bicubic and Lanczos filters overshoot at edges.
    return resized if resized.dtype == np.uint8 else np.rint(resized).clip(0, 255).astype(np.uint8)


def _square(image: Image.Image, side: int, spec: FeatureSpec) -> NDArray[np.uint8]:
    left, top, width, height = _box(image, side, spec)
    resized = _resized(image, side, spec)
    if resized.ndim == 2:
        resized = np.repeat(resized[..., None], 3, axis=-1)
    if (width, height) == (side, side):
        return resized
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [round(255 * value) for value in spec.lpm.mean]
    square[top : top + height, left : left + width] = resized
    return square


def _one_channel(image: Image.Image) -> Image.Image | None:
    """Return one channel if all three are identical (3x faster to resize, same result), else None."""
    if image.mode == "F":
        return image
    sample = np.asarray(image.resize((_SAMPLE, _SAMPLE), Image.Resampling.NEAREST))
    if (sample != sample[..., :1]).any():
        return None
    red, *others = (image.getchannel(channel) for channel in range(3))
    return red if all(other.tobytes() == red.tobytes() for other in others) else None
