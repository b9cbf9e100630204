"""Embedded colour profiles: pixels of any colour space to sRGB, in which the models learned to see.

A profile that cannot be read is an error. Viewers ignore it and show other colours than the file means; a data set in
which some images are converted and others are not would differ by scanner and not by finding.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from PIL import Image, ImageCms

TOLERANCE = 2
"""Largest move of a colour, of 255, of a profile that counts as sRGB: its pixels are kept bit for bit.

Profiles named sRGB differ in the last digits of their curves, and a conversion rounds."""

_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of the pixels that it describes."""


def srgb_conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return the conversion of pixels to sRGB, or None where their profile is sRGB.

    It acts on each pixel by itself, so that an image may be converted piece by piece: relative colorimetric with black
    point compensation, to mode RGB.

    Args:
        profile: ICC profile (ICC.1), as embedded.
        mode: Of the pixels: L, RGB or CMYK; grey pixels with a profile for colours are taken as neutral colours.

    Raises:
        ValueError: If the profile is damaged, or describes other pixels than these.
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
    if space == "RGB" and _stays(grid := _grid(), _applied(grid, transform)):
        return None
    return partial(_applied, transform=transform)


def _grey_conversion(source: ImageCms.ImageCmsProfile, space: str) -> Callable[[Image.Image], Image.Image] | None:
    # By a table of the 256 levels, computed exactly: the library's own shortcut for grey is off by ten in the shadows.
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    after = _applied(ramp.convert(space), _transform(source, space, ImageCms.Flags.NOOPTIMIZE))
    if _stays(ramp, after):
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


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ValueError("its colour profile cannot be applied")
    return converted


def _stays(before: Image.Image, after: Image.Image) -> bool:
    """Whether no colour moved further than `TOLERANCE`."""
    moved = np.asarray(before.convert("RGB")).astype(np.int16) - np.asarray(after)
    return int(np.abs(moved).max()) <= TOLERANCE


@cache
def _grid() -> Image.Image:
    """Colours from all over the cube."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(27, 27, 3)))
