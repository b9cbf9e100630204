"""The one place where an image file becomes pixels: every stage sees the same RGB image, or the same error."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from schemas.errors import ImageError
from stages.colour import to_srgb

_MAGIC: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"II\x2a\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00\x2a", TiffImagePlugin.TiffImageFile),
    (b"II\x2b\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00\x2b", TiffImagePlugin.TiffImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
)
"""First bytes of a file -> its reader. The suffix is not asked: a PNG named .jpg is still an image."""

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
_NEW_SUBFILE_TYPE = 0x00FE
_REDUCED, _MASK = 1, 4


def read_image(path: Path, *, max_pixels: int, min_side: int = 1) -> Image.Image:
    """Read a PNG, JPEG, TIFF, BMP or WebP file as an upright 8-bit RGB image, wholly decoded.

    - 16-bit grey is scaled from the range of its type (0..65535, or 0..4095 of a 12-bit TIFF) to 0..255 and rounded,
      never clipped; of 16-bit colour the upper byte is kept.
    - Transparent pixels are laid over black, the background of radiographs and microscopy.
    - Of animations the first frame is taken. A TIFF of several pages is refused, since nobody can say which of them is
      the image; smaller copies and masks of the first page do not count.
    - An embedded colour profile is applied (`stages.colour`): the pixels are sRGB, as the models learned them. A
      damaged one is refused.

    Safe to call from several threads; no setting of Pillow is read or changed.

    Args:
        path: The file.
        max_pixels: Files whose header announces more pixels are refused before anything is decoded.
        min_side: Images with a side shorter than this, in pixels, are refused.

    Returns:
        Image of mode RGB without metadata, independent of the file.

    Raises:
        ImageError: Whatever is wrong with the file, with a reason of a few words.
    """
    try:
        # Checked first because opening a pipe would wait for a writer for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(str(path), "is a folder" if path.is_dir() else "is not a regular file")
        with path.open("rb") as file:
            return _decode(path, file, max_pixels, min_side)
    except ImageError:
        raise
    # Pillow's readers raise nearly anything on damaged bytes (SyntaxError, KeyError, struct.error, zlib.error, ...).
    except Exception as error:
        raise ImageError(str(path), _reason(error)) from error


def _decode(path: Path, file: BinaryIO, max_pixels: int, min_side: int) -> Image.Image:
    start = file.read(16)
    if not start:
        raise ImageError(str(path), "the file is empty")
    reader = next((reader for magic, reader in _MAGIC if start.startswith(magic)), None)
    if reader is None:
        raise ImageError(str(path), "is not a PNG, JPEG, TIFF, BMP or WebP image")
    file.seek(0)
    # The reader itself and not Image.open: that has a limit of its own, shared by the whole process, on the number
    # of pixels. No file name is given to it: it would map the file into memory, and a file cut short under a map
    # ends the process.
    with reader(file) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                str(path), f"{width} x {height} pixels are more than data.max_pixels allows ({max_pixels:,})"
            )
        if min(width, height) < min_side:
            raise ImageError(str(path), f"{width} x {height} pixels: a side is shorter than data.min_side ({min_side})")
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _has_pages(image):
            raise ImageError(str(path), "has several pages; save each as a file of its own")
        image.load()
        rgb = _to_rgb(path, image)
        turn = _TURN.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info.clear()
    return rgb


def _has_pages(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether there is a second page that is neither a smaller copy of the first (as in pyramids) nor its mask."""
    try:
        for page in itertools.count(1):
            image.seek(page)
            if not int(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & (_REDUCED | _MASK):
                return True
    except EOFError:
        return False
    finally:
        image.seek(0)
    return False


def _to_rgb(path: Path, image: ImageFile) -> Image.Image:
    profile = image.info.get("icc_profile")
    pixels, alpha = _plain(path, image)
    if profile:
        try:
            pixels = to_srgb(pixels, profile)
        except ValueError as error:
            raise ImageError(str(path), str(error)) from error
    rgb = pixels.convert("RGB")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, (0, 0, 0, 255)), rgb).convert("RGB")


def _plain(path: Path, image: ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """Colours of mode L, RGB or CMYK without transparency, and transparency if there is any."""
    if image.mode.startswith("I;16") or (image.mode == "I" and isinstance(image, PngImagePlugin.PngImageFile)):
        return _grey16_to_grey8(image), None
    if image.mode in ("I", "F"):
        # Any guess would be wrong for somebody: Hounsfield units, counts and [0, 1] all come in these types.
        raise ImageError(str(path), "signed, 32-bit or float pixels have no known range; save it with 8 or 16 bits")
    if image.mode in ("La", "LA", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        mode = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        whole = image.convert(mode) if mode else image
        rgba = whole.convert("RGBA")
        return whole.getchannel("L") if whole.mode == "LA" else rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return image if image.mode in ("L", "CMYK") else image.convert("RGB"), None


def _grey16_to_grey8(image: ImageFile) -> Image.Image:
    # Not Pillow's own conversion: depending on its version it clips at 255 or drops the lower byte.
    highest, inverted = 65535, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        highest = 2 ** int(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
        inverted = image.tag_v2.get(_PHOTOMETRIC, 1) == 0
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + highest // 2) // highest).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey)


def _orientation(image: ImageFile) -> int:
    # A TIFF is turned by its reader, which then takes the note away.
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # A damaged note beside whole pixels: shown as it lies, as every viewer does.
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return {FileNotFoundError: "no such file", PermissionError: "permission denied"}.get(
            type(error), os.strerror(error.errno).lower()
        )
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return "too large to be decoded"
    if isinstance(error, OSError) and "truncated" in str(error):
        return "the file is truncated"
    if isinstance(error, SyntaxError):
        return "the header is damaged or truncated"
    return "the file is damaged"
