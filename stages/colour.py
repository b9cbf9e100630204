"""Convert pixels with an embedded colour profile to sRGB, the colour space in which the models were trained.

An unreadable profile is an error. Viewers ignore it and show wrong colours; but in a data set with some images
converted and others not, colours would depend on the scanner rather than on the finding.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from PIL import Image, ImageCms

TOLERANCE = 2
"""Largest change of a channel (0..255) for a profile to count as sRGB, whose pixels are left unchanged.

Profiles named sRGB differ in the last digits of their curves, and conversion rounds."""

_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> Pillow mode of its pixels."""


def srgb_conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return the conversion of pixels to sRGB, or None if their profile is sRGB already.

    The conversion is relative colorimetric with black point compensation and returns mode RGB. It treats each pixel
    separately, so an image may be converted in pieces.

    Args:
        profile: Embedded ICC profile (ICC.1).
        mode: Mode of the pixels: L, RGB or CMYK; grey pixels with an RGB profile are converted as neutral colours.

    Raises:
        ValueError: If the profile is damaged, or does not describe pixels of this mode.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = _SPACES.get(source.profile.xcolor_space)
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError("its colour profile is damaged") from error
    if mode == "L" and space in ("L", "RGB"):
        return _grey_conversion(source, space)
    if space != mode:
        raise ValueError(f"its colour profile is for {source.profile.xcolor_space.strip() or 'other'} pixels")
    transform = _transform(source, mode)
    if space == "RGB" and _is_unchanged(grid := _grid(), _apply(grid, transform)):
        return None
    return partial(_apply, transform=transform)


def _grey_conversion(source: ImageCms.ImageCmsProfile, space: str) -> Callable[[Image.Image], Image.Image] | None:
    # A lookup table of the 256 levels, computed exactly: LittleCMS's optimisation for grey is off by 10 in the shadows.
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    after = _apply(ramp.convert(space), _transform(source, space, ImageCms.Flags.NOOPTIMIZE))
    if _is_unchanged(ramp, after):
        return None
    tables = [channel.tobytes() for channel in after.split()]
    return lambda image: Image.merge("RGB", [image.point(table) for table in tables])


def _transform(
    source: ImageCms.ImageCmsProfile, mode: str, flags: ImageCms.Flags = ImageCms.Flags.NONE
) -> ImageCms.ImageCmsTransform:
    try:
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError("its colour profile is damaged") from error


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ValueError("its colour profile cannot be applied")
    return converted


def _is_unchanged(before: Image.Image, after: Image.Image) -> bool:
    """Whether no channel changed by more than `TOLERANCE`."""
    difference = np.asarray(before.convert("RGB")).astype(np.int16) - np.asarray(after)
    return int(np.abs(difference).max()) <= TOLERANCE


@cache
def _grid() -> Image.Image:
    """Return an image of 729 colours on a regular grid of the RGB cube."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(27, 27, 3)))
