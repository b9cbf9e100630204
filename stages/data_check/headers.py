"""Read the format, mode and bit depth of an image file from its header."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from stages.image_kinds import kind_of

_READERS: dict[str, type[ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}
_BITS_PER_SAMPLE = 0x0102
_PNG_DEPTH = 24
"""Offset of the bit depth in a PNG file."""
UNKNOWN = "unknown"


class Header(NamedTuple):
    """Properties of a file that a class should not depend on."""

    format: str
    """Such as "JPEG"."""
    mode: str
    """Mode of Pillow, such as L for grey and P for a palette."""
    bits: str
    """Bits per sample."""


def read_header(path: Path) -> Header:
    """Read the header of an image that was decoded before; "unknown" for what cannot be told."""
    kind = kind_of(path) or UNKNOWN
    reader = _READERS.get(kind)
    if reader is None:
        return Header(kind, UNKNOWN, UNKNOWN)
    # Not by file name: Pillow would map the file into memory. Nothing is decoded.
    with path.open("rb") as file:
        try:
            head = file.read(_PNG_DEPTH + 1)
            file.seek(0)
            with reader(file) as image:
                return Header(kind, image.mode, _bits(image, head))
        except Exception:
            # The file changed after it was decoded.
            return Header(kind, UNKNOWN, UNKNOWN)


def _bits(image: Image.Image, head: bytes) -> str:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return str(max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if isinstance(image, PngImagePlugin.PngImageFile) and len(head) > _PNG_DEPTH:
        return str(head[_PNG_DEPTH])
    return "1" if image.mode == "1" else "8"
