"""Check compressed streams before Pillow decodes them, for corrupt data and for excessive decoding time.

Pillow drops libjpeg's warnings and fills damaged regions with grey or with pixels from elsewhere. Each JPEG stream is
therefore also decoded with simplejpeg, a wrapper of libjpeg-turbo that returns the warnings: to one channel at an
eighth of the size, which spends nearly all of its time on the entropy-coded data to be checked.
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
_WITHOUT_SEGMENT = (0x01, 0xD8, 0xD9)
"""Markers without a segment."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_LS = 0xF7
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)

MAX_SEGMENTS = 5_000
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 2_500_000_000
"""Limit of scans times pixels: each scan of a progressive JPEG visits every block, even if it has few bytes."""
USUAL_SCANS = 12
"""Scans allowed in a progressive JPEG of any size; libjpeg's default script has 10."""
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
"""Prefixes of libjpeg's messages about damaged data; simplejpeg also raises for features that it does not support.

Some are errors that Pillow never sees: it stops after the last row, so data between that row and the end is read only
here.
"""

_COMPRESSION, _JPEG, _DEFLATE = 259, 7, (8, 32946)
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES, _JPEG_TABLES = 273, 279, 324, 325, 347
_INFLATED_BYTES = 2**20


@dataclass(frozen=True)
class JpegStructure:
    """Structure of a JPEG file according to its markers."""

    scans: int
    """Number of scans."""
    progressive: bool
    """Whether the coefficients of all scans are kept in memory."""


def inspect_jpeg(data: bytes) -> JpegStructure:
    """Read the segments of a JPEG up to its first scan, and count its scans.

    Raises:
        RefusalError: If decoding would take far more time or memory than its pixels need.
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
            # Pillow joins EXIF segments in this way.
            exif = exif + b"\n" + bytes(body[6:]) if exif else bytes(body)
        elif marker == _SOS:
            limit = min(MAX_SCANS, max(USUAL_SCANS, MAX_SCANNED_PIXELS // max(1, pixels)))
            scans = _count_scans(data, end, limit)
            if scans > limit:
                raise RefusalError(f"has more than {limit} JPEG scans")
    check_exif(exif)
    return JpegStructure(scans, progressive or scans > 1)


def jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """Return width, height and channels of a JPEG or JPEG-LS stream from its header; None where it is damaged."""
    frame = _frame(data)
    if frame is None:
        return None
    height, width = struct.unpack(">HH", frame[1:5])
    return width, height, frame[5]


def jpeg_bits(data: bytes) -> int:
    """Return the bits per channel of a JPEG or JPEG-LS stream from its header; 0 where it is damaged."""
    frame = _frame(data)
    return 0 if frame is None else frame[0]


def _frame(data: bytes) -> bytes | None:
    for marker, body, _ in _header(data):
        if (marker in _FRAMES or marker == _JPEG_LS) and len(body) >= 6:
            return body
    return None


def _header(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield the segments up to the first scan: marker, body, and the position after the segment."""
    position, skipped = 2, 0
    while (match := _MARKER.search(data, position)) is not None:
        marker = match[1][0]
        # Decoders skip bytes between segments one at a time.
        skipped += match.end() - 2 - position
        if skipped > _MAX_SKIPPED:
            break
        position = match.end()
        if marker in _WITHOUT_SEGMENT:
            yield marker, b"", position
            continue
        length = max(2, int.from_bytes(data[position : position + 2], "big"))
        yield marker, data[position + 2 : position + length], position + length
        position += length
        if marker == _SOS:
            return
    if len(data) - position > _MAX_SKIPPED:
        raise RefusalError("has more than 64 KiB between its JPEG segments")


def _count_scans(data: bytes, position: int, limit: int) -> int:
    """Count the scans from the first one at `position`; the count may be too high as long as it is within `limit`."""
    # Fast, but also counts markers after the end of the image, such as those in the video of a motion photo.
    scans = 1 + data.count(b"\xff\xda", position)
    if scans <= limit:
        return scans
    scans = 1
    while scans <= limit and (match := _MARKER.search(data, position)) is not None and match[1][0] != _EOI:
        position = match.end()
        if match[1][0] not in _WITHOUT_SEGMENT:
            scans += match[1][0] == _SOS
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return scans


def jpeg_warning(data: bytes, components: int) -> str | None:
    """Return libjpeg's warning about corrupt data in a JPEG stream, or None.

    A flipped bit that turns one valid code into another changes pixels undetectably.
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

    JPEG streams are checked like JPEG files, deflated ones by their checksums. Other compressions have neither
    checksums nor warnings.
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
            # An abbreviated stream: join the tables without their end marker and the strip without its start marker.
            warning = jpeg_warning(tables[:-2] + data[2:] if tables else data, len(image.getbands()))
        else:
            warning = _deflate_warning(data, image.width * image.height * 64)
        if warning is not None:
            return warning
    return None


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (int(str(value)),) if value is not None else ()


def _deflate_warning(data: bytes, limit: int) -> str | None:
    """Inflate a strip in pieces, up to `limit` bytes: anything beyond cannot be pixels."""
    inflate = zlib.decompressobj()
    try:
        while data and not inflate.eof and limit > 0:
            limit -= len(inflate.decompress(data, _INFLATED_BYTES))
            data = inflate.unconsumed_tail
    except zlib.error:
        return f"{DAMAGED} (a deflated strip does not match its checksum)"
    return None if inflate.eof or limit <= 0 else TRUNCATED
