"""Compressed streams before Pillow decodes them: is their data corrupt, and do they take longer than their pixels need?

Pillow drops libjpeg's warnings and fills the damaged part of an image with grey or with pixels of another place. So
each JPEG stream is decoded by libjpeg-turbo as simplejpeg wraps it, which returns the warnings: to one channel at an
eighth of the size, where nearly all of the time goes into the entropy-coded data that is checked.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import simplejpeg
from PIL.TiffImagePlugin import TiffImageFile

from stages.image_limits import DAMAGED, TRUNCATED, RefusalError, check_exif

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""A marker that is neither a stuffed byte nor a restart marker, after any number of fill bytes."""
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_ALONE = (0x01, 0xD8, 0xD9)
"""Markers without a segment."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)

MAX_SEGMENTS = 5_000
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 2_500_000_000
"""Scans times pixels: each scan of a progressive JPEG visits every block, even where it holds a few bytes."""
USUAL_SCANS = 12
"""Of a progressive JPEG of any size; the usual script of libjpeg has 10."""
_MAX_SKIPPED = 65_536

_CORRUPT = (
    "Corrupt JPEG data",
    "Premature end of",
    "Inconsistent progression",
    "Invalid ",
    "Bogus ",
    "Unsupported marker type",
    "Huffman table",
    "Quantization table",
)
"""What libjpeg's messages about damaged data begin with; simplejpeg raises for what it does not support, too.

Errors are among them: Pillow stops at the last row, so that what lies between it and the end is read only here.
"""

_COMPRESSION, _JPEG, _DEFLATE = 259, 7, (8, 32946)
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES, _JPEG_TABLES = 273, 279, 324, 325, 347
_INFLATED_BYTES = 2**20


@dataclass(frozen=True)
class JpegStructure:
    """What the markers of a JPEG tell."""

    scans: int
    progressive: bool


def inspect_jpeg(data: bytes) -> JpegStructure:
    """Walk through the segments of a JPEG to its first scan, and count its scans.

    Raises:
        RefusalError: If decoding would take far longer, or far more memory, than its pixels need.
    """
    pixels = 0
    progressive = False
    exif = b""
    scans = 0
    for segment, (marker, body, end) in enumerate(_header(data)):
        if segment >= MAX_SEGMENTS:
            raise RefusalError(f"has more than {MAX_SEGMENTS:,} JPEG segments")
        if marker in _FRAMES and len(body) >= 6 and not pixels:
            height, width = struct.unpack(">HH", body[1:5])
            pixels, progressive = width * height, marker in _PROGRESSIVE
        elif marker == _APP1 and body.startswith(b"Exif\0\0"):
            # Pillow joins all of them in this way.
            exif = exif + b"\n" + bytes(body[6:]) if exif else bytes(body)
        elif marker == _SOS:
            most = min(MAX_SCANS, max(USUAL_SCANS, MAX_SCANNED_PIXELS // max(1, pixels)))
            scans = _count_scans(data, end, most)
            if scans > most:
                raise RefusalError(f"has more than {most} JPEG scans")
    check_exif(exif)
    return JpegStructure(scans, progressive or scans > 1)


def _header(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Segments to the start of the first scan: marker, body and where the next one may begin."""
    position, skipped = 2, 0
    while (found := _MARKER.search(data, position)) is not None:
        marker = found[1][0]
        # Readers step over these bytes one by one.
        skipped += found.end() - 2 - position
        if skipped > _MAX_SKIPPED:
            break
        position = found.end()
        if marker in _ALONE:
            yield marker, b"", position
            continue
        length = max(2, int.from_bytes(data[position : position + 2], "big"))
        yield marker, data[position + 2 : position + length], position + length
        position += length
        if marker == _SOS:
            return
    if len(data) - position > _MAX_SKIPPED:
        raise RefusalError("has more than 64 KiB between its JPEG segments")


def _count_scans(data: bytes, position: int, most: int) -> int:
    """Count scans, the first of which begins at `position`; where there are at most `most`, more may be counted."""
    # Fast, but what follows the end of the image, as the film of a moving photograph, counts too.
    scans = 1 + data.count(b"\xff\xda", position)
    if scans <= most:
        return scans
    scans = 1
    while scans <= most and (found := _MARKER.search(data, position)) is not None and found[1][0] != _EOI:
        position = found.end()
        if found[1][0] not in _ALONE:
            scans += found[1][0] == _SOS
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return scans


def jpeg_warning(data: bytes, components: int) -> str | None:
    """Return libjpeg's warning about corrupt data in a JPEG stream, or None.

    A flip that turns one valid code into another one changes pixels without a trace; no decoder can tell.
    """
    try:
        simplejpeg.decode_jpeg(
            data, "CMYK" if components == 4 else "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8
        )
    except ValueError as error:
        text = str(error)
        if text.startswith("Premature end of JPEG file"):
            return TRUNCATED
        return f"{DAMAGED} ({text[0].lower()}{text[1:]})" if text.startswith(_CORRUPT) else None
    return None


def tiff_warning(image: TiffImageFile, file: BinaryIO) -> str | None:
    """Return a warning about corrupt data in the strips or tiles of a TIFF, or None.

    JPEG streams are checked as JPEG files are, and deflated ones by their checksums. The other compressions have
    neither checksums nor warnings.
    """
    tags = image.tag_v2
    compression = int(tags.get(_COMPRESSION, 1))
    if compression not in (_JPEG, *_DEFLATE):
        return None
    place, length = (_TILE_OFFSETS, _TILE_BYTES) if _TILE_OFFSETS in tags else (_STRIP_OFFSETS, _STRIP_BYTES)
    tables = bytes(tags.get(_JPEG_TABLES, b""))
    for offset, count in zip(_numbers(tags.get(place)), _numbers(tags.get(length)), strict=False):
        file.seek(offset)
        data = file.read(count)
        if compression == _JPEG:
            inspect_jpeg(data)
            # An abbreviated stream: the tables without their end, the strip without its beginning.
            warning = jpeg_warning(tables[:-2] + data[2:] if tables else data, len(image.getbands()))
        else:
            warning = _deflate_warning(data, image.width * image.height * 64)
        if warning is not None:
            return warning
    return None


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (int(str(value)),) if value is not None else ()


def _deflate_warning(data: bytes, most: int) -> str | None:
    """Inflate a strip piece by piece; what goes on beyond `most` bytes is no pixels."""
    inflate = zlib.decompressobj()
    try:
        while data and not inflate.eof and most > 0:
            most -= len(inflate.decompress(data, _INFLATED_BYTES))
            data = inflate.unconsumed_tail
    except zlib.error:
        return f"{DAMAGED} (a deflated strip does not match its checksum)"
    return None if inflate.eof or most <= 0 else TRUNCATED
