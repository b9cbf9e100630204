"""Check the compressed frame of a DICOM file before a decoder sees it.

Decoders allocate memory for the size that the compressed stream declares, whatever the header of the file says.
"""

from __future__ import annotations

import struct

from stages.image_limits import DAMAGED, TRUNCATED, RefusalError
from stages.image_streams import inspect_jpeg, jpeg_bits, jpeg_size, jpeg_warning

_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))
_RLE = "1.2.840.10008.1.2.5"

MAX_PRECINCTS = 1_000_000
"""Most precincts of a JPEG 2000 stream; with the default size an image has one per resolution."""
MAX_TILES = 16_384
"""Most tiles of a JPEG 2000 stream."""

_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_SIZ, _COD, _SOT = 0xFF51, 0xFF52, 0xFF90
_MAX_BOXES, _MAX_MARKERS = 100, 1000


def check_frame(data: bytes, syntax: str, size: tuple[int, int], samples: int) -> str | None:
    """Check that a compressed frame has the size that the header declares.

    Args:
        data: Compressed frame.
        syntax: UID of the transfer syntax.
        size: (width, height) in pixels by the header.
        samples: Channels by the header.

    Returns:
        Warning about corrupt data, or None.

    Raises:
        RefusalError: If the size differs, or decoding would take far more time or memory than the pixels need.
    """
    if syntax in (*_JPEG, *_LOSSLESS_JPEG):
        inspect_jpeg(data)
        _compare(jpeg_size(data), size, samples)
        if syntax in _LOSSLESS_JPEG or jpeg_bits(data) != 8:
            return None if _has_end(data) else TRUNCATED
        return jpeg_warning(data, samples)
    if syntax in _JPEG_LS:
        _compare(jpeg_size(data), size, samples)
        if not _has_end(data):
            # Even if warnings are accepted: CharLS may never return from a stream without an end.
            raise RefusalError(TRUNCATED)
        return None
    if syntax in _JPEG_2000:
        stream = _codestream(data)
        _compare(_check_codestream(stream), size, samples)
        return None if b"\xff\xd9" in stream[-16:] else TRUNCATED
    if syntax == _RLE and (len(data) < 64 or not 1 <= int.from_bytes(data[:4], "little") <= 15):
        raise RefusalError(DAMAGED)
    return None


def _has_end(data: bytes) -> bool:
    """Whether a stream has its end marker; padding may follow it."""
    return data.rstrip(b"\0\xff").endswith(b"\xff\xd9")


def _compare(found: tuple[int, int, int] | None, size: tuple[int, int], samples: int) -> None:
    if found is None:
        raise RefusalError(DAMAGED)
    if found != (*size, samples):
        width, height, channels = found
        raise RefusalError(
            f"its compressed pixels are {width} x {height} with {channels} channels; its header says "
            f"{size[0]} x {size[1]} with {samples}"
        )


def _codestream(data: bytes) -> bytes:
    """Return the codestream of a JPEG 2000 frame, which some writers leave in the boxes of a JP2 file."""
    if not data.startswith(_JP2):
        return data
    position = 0
    for _ in range(_MAX_BOXES):
        head = data[position : position + 16]
        if len(head) < 8:
            break
        length, start = int.from_bytes(head[:4], "big"), position + 8
        if length == 1:
            length, start = int.from_bytes(head[8:16], "big"), position + 16
        end = position + length if length else len(data)
        if head[4:8] == b"jp2c":
            return data[start:end]
        if end <= position:
            break
        position = end
    raise RefusalError(DAMAGED)


def _check_codestream(stream: bytes) -> tuple[int, int, int] | None:
    """Return width, height and channels of a JPEG 2000 codestream; None where its header is damaged."""
    if stream[:2] != b"\xff\x4f":
        return None
    position, found, tiles = 2, None, 1
    for _ in range(_MAX_MARKERS):
        if len(stream) < position + 4:
            return None
        marker, length = struct.unpack_from(">HH", stream, position)
        body = stream[position + 4 : position + 2 + length]
        if marker == _SOT:
            return found
        if marker == _SIZ and len(body) >= 36:
            right, bottom, left, top, *tile, tile_left, tile_top, channels = struct.unpack_from(">8IH", body, 2)
            if any(body[start : start + 2] != b"\1\1" for start in range(37, 37 + 3 * min(channels, 4), 3)):
                raise RefusalError("has JPEG 2000 channels of different sizes")
            if not all(tile) or right <= left or bottom <= top:
                return None
            tiles = _ceil(right - tile_left, tile[0]) * _ceil(bottom - tile_top, tile[1])
            if tiles > MAX_TILES:
                raise RefusalError(f"has more than {MAX_TILES:,} JPEG 2000 tiles")
            found = right - left, bottom - top, channels
        elif marker == _COD and found is not None:
            _check_precincts(body, found, tiles)
        position += 2 + length
    return None


def _check_precincts(body: bytes, found: tuple[int, int, int], tiles: int) -> None:
    """Refuse an image that is divided into very many precincts, for each of which decoders allocate memory."""
    if len(body) < 10 or not body[0] & 1:
        return
    levels, sizes, total = body[5], body[10:], tiles
    for resolution, size in enumerate(sizes[: levels + 1]):
        scale = max(0, levels - resolution)
        total += _ceil(found[0] >> scale, 1 << (size & 15)) * _ceil(found[1] >> scale, 1 << (size >> 4))
    if total * found[2] > MAX_PRECINCTS:
        raise RefusalError(f"has more than {MAX_PRECINCTS:,} JPEG 2000 precincts")


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
