"""Stored pixels to upright RGB or float grey: windows, transparency, colour profiles, EXIF orientation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from schemas.rendering import Window
from stages.colour import srgb_conversion
from stages.grey_windows import linear, percentile_range
from stages.image_limits import MAX_PROFILE_BYTES, RefusalError

_BAND_PIXELS = 4_000_000
"""Pixels that are converted at a time, so that the copies in between stay small."""

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 0x0102
_PHOTOMETRIC = 0x0106
_SAMPLE_FORMAT, _SIGNED = 0x0153, 2


def take_upright(image: Image.Image, window: Window | None) -> Image.Image:
    """Upright pixels of mode RGB, or F with grey values of 0..255; the image may lose its own.

    Args:
        image: As its reader decoded it.
        window: Grey values that become black and white; None: grey of mode F is 0..255 already.
    """
    rgb = _converted(image, window)
    turn = _TURN.get(_orientation(image))
    if turn is not None:
        # The pixels of the file go first: there is memory for two copies.
        image.im = Image.new("L", (1, 1)).im
        rgb = rgb.transpose(turn)
    rgb.info.clear()
    return rgb


def upright_copy(image: Image.Image, window: Window | None) -> Image.Image:
    """Upright pixels as by `take_upright`; the image stays as it is."""
    rgb = _converted(image, window)
    turn = _TURN.get(_orientation(image))
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info.clear()
    return upright


def _converted(image: Image.Image, window: Window | None) -> Image.Image:
    """Pixels of mode RGB or F as they are stored, converted band by band."""
    if image.mode == "F" and window is None:
        return image
    convert = _conversion(image, window)
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        return convert(image)
    rgb = Image.new(convert(image.crop((0, 0, 1, 1))).mode, image.size)
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def check_colours(image: Image.Image, window: Window | None) -> None:
    """Convert one row: what can go wrong depends on the type of the pixels and on the profile."""
    if image.mode != "F" or window is not None:
        _conversion(image, window)(image.crop((0, 0, image.width, 1)))


def is_dark(image: Image.Image) -> bool:
    """Whether 16-bit grey uses so little of its range that it is nearly black without a window."""
    if not _is_grey16(image):
        return False
    highest, inverted = _type_range(image)
    return not inverted and int(np.asarray(image).max()) < highest // 8


def _conversion(image: Image.Image, window: Window | None) -> Callable[[Image.Image], Image.Image]:
    """From pixels as they are stored to mode RGB or F."""
    plain = _plain(image, window)
    profile = image.info.get("icc_profile")
    if "icc_profile" in image.info and profile is None:
        raise RefusalError("its colour profile is damaged")
    to_srgb = None
    if profile:
        if len(profile) > MAX_PROFILE_BYTES:
            raise RefusalError("its colour profile has more than 16 MiB")
        try:
            to_srgb = srgb_conversion(profile, plain(image.crop((0, 0, 1, 1)))[0].mode.replace("F", "L"))
        except ValueError as error:
            raise RefusalError(str(error)) from error

    def convert(stored: Image.Image) -> Image.Image:
        pixels, alpha = plain(stored)
        if pixels.mode == "F" and to_srgb is None:
            return pixels
        if pixels.mode == "F":
            pixels = _rounded(pixels)
        rgb = (pixels if to_srgb is None else to_srgb(pixels)).convert("RGB")
        if alpha is None:
            return rgb
        rgb.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", rgb.size, (0, 0, 0, 255)), rgb).convert("RGB")

    return convert


def _plain(
    image: Image.Image, window: Window | None
) -> Callable[[Image.Image], tuple[Image.Image, Image.Image | None]]:
    """From stored pixels to colours of mode L, F, RGB or CMYK without transparency, and transparency if any."""
    if _is_grey16(image):
        return _grey16(image) if window in ("stored", None) else _windowed(image, window)
    if image.mode in ("I", "F"):
        if window in ("stored", "full", None):
            # Any guess would be wrong for somebody: Hounsfield units, counts and [0, 1] all come in these types.
            raise RefusalError(
                "signed, 32-bit or float pixels have no known range; save it with 8 or 16 bits, or set features.window "
                "to percentile or [center, width]"
            )
        return _windowed(image, window)
    if image.mode in ("La", "LA", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        return _with_alpha
    if image.mode == "1":
        return lambda stored: (stored.convert("L"), None)
    if image.mode in ("L", "CMYK"):
        return lambda stored: (stored, None)
    return lambda stored: (stored.convert("RGB"), None)


def _with_alpha(stored: Image.Image) -> tuple[Image.Image, Image.Image]:
    mode = {"La": "LA", "RGBa": "RGBA"}.get(stored.mode)
    whole = stored.convert(mode) if mode else stored
    rgba = whole.convert("RGBA")
    return whole.getchannel("L") if whole.mode == "LA" else rgba.convert("RGB"), rgba.getchannel("A")


def _is_grey16(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and isinstance(image, PngImagePlugin.PngImageFile))


def _type_range(image: Image.Image) -> tuple[int, bool]:
    """Return the highest value of 16-bit grey by its type, and whether it is black."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 65535, False
    return 2 ** int(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]) - 1, image.tag_v2.get(_PHOTOMETRIC, 1) == 0


def _grey16(image: Image.Image) -> Callable[[Image.Image], tuple[Image.Image, None]]:
    # Not Pillow's own conversion: depending on its version it clips at 255 or drops the lower byte.
    highest, inverted = _type_range(image)

    def convert(stored: Image.Image) -> tuple[Image.Image, None]:
        values = np.asarray(stored).astype(np.uint32)
        grey = ((values * 255 + highest // 2) // highest).astype(np.uint8)
        return Image.fromarray(255 - grey if inverted else grey), None

    return convert


def _windowed(image: Image.Image, window: Window | None) -> Callable[[Image.Image], tuple[Image.Image, None]]:
    """From grey values of any type to 0..255, mode F; not-a-number is black."""
    values = np.asarray(image)
    if image.mode == "I" and isinstance(image, TiffImagePlugin.TiffImageFile) and values.min() < 0:
        kind = int((image.tag_v2.get(_SAMPLE_FORMAT) or (1,))[0])
        if kind != _SIGNED:
            raise RefusalError("32-bit pixels above 2,147,483,647 are not read")
    inverted = _type_range(image)[1]
    if isinstance(window, tuple):
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    elif window == "full":
        low, high = 0.0, float(_type_range(image)[0])
    else:
        invalid = ~np.isfinite(values) if values.dtype.kind == "f" else None
        low, high = percentile_range(values, invalid)

    def convert(stored: Image.Image) -> tuple[Image.Image, None]:
        grey = np.nan_to_num(linear(np.asarray(stored), low, high))
        return Image.fromarray(255 - grey if inverted else grey), None

    return convert


def _rounded(grey: Image.Image) -> Image.Image:
    return Image.fromarray(np.rint(np.asarray(grey)).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    # A TIFF is turned by its reader, which then takes the note away.
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # The EXIF data is damaged, the pixels are not: keep the stored orientation, as viewers do.
        return 1
