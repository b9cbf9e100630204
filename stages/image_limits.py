"""Refuse files whose structure would make decoding take far more time or memory than their pixels need.

Only headers and directories are read here, never pixels.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

TRUNCATED, DAMAGED = "the file is truncated", "the file is damaged"
NEVER_FOLLOWED = "is a DICOMDIR, which is never followed"

MAX_PROFILE_BYTES = 16 * 2**20
"""Largest colour profile; profiles of printers have a few MiB."""
MAX_PNG_CHUNKS = 100_000
"""Most encoders write chunks of 8 KiB, so this allows files of about 800 MiB."""
MAX_TIFF_PAGES = 64
"""Most directories: a page, its mask and its reduced copies. A pyramid has fewer than 32."""
MAX_TIFF_TAGS = 4_096
MAX_TIFF_BLOCKS = 200_000
"""Most strips or tiles."""
MAX_RLE_BYTES = 4 * 2**20
"""Largest run-length-encoded BMP, which Pillow decodes in pure Python."""
MAX_WEBP_CHUNKS = 10_000

_BLOCK_TAGS = (273, 324)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_READ_BYTES = 2**20


class RefusalError(ValueError):
    """A file is not decoded; the message is a short reason."""


def count_png_chunks(file: BinaryIO) -> None:
    """Step through the chunks of a PNG, which Pillow reads one by one.

    Raises:
        RefusalError: If there are too many.
    """
    position = 8
    for _ in range(MAX_PNG_CHUNKS):
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        position += 12 + int.from_bytes(head[:4], "big")
    raise RefusalError(f"has more than {MAX_PNG_CHUNKS:,} PNG chunks")


def png_warning(file: BinaryIO) -> str | None:
    """Return a warning about the first chunk of a PNG that does not match its checksum, or None.

    Pillow does not verify the checksums of the pixels and of the chunks after them. Bytes after the last chunk are
    ignored.
    """
    file.seek(8)
    warning = None
    while True:
        head = file.read(8)
        if len(head) < 8:
            return warning or TRUNCATED
        left, name = int.from_bytes(head[:4], "big"), head[4:]
        checksum = zlib.crc32(name)
        while left:
            data = file.read(min(left, _READ_BYTES))
            if not data:
                return warning or TRUNCATED
            checksum = zlib.crc32(data, checksum)
            left -= len(data)
        stored = file.read(4)
        if len(stored) < 4:
            return warning or TRUNCATED
        if int.from_bytes(stored, "big") != checksum:
            warning = warning or f"{DAMAGED} (its {name.decode('ascii', 'replace')} chunk does not match its checksum)"
        if name == b"IEND":
            return warning


def check_tiff(file: BinaryIO, size: int) -> None:
    """Check the directories of a TIFF.

    Args:
        file: The file, at any position.
        size: Length of the file in bytes.

    Raises:
        RefusalError: If there are too many directories, they form a loop, or their values overlap many times.
    """
    file.seek(0)
    reader = _Directories(file, size)
    seen: set[int] = set()
    while reader.offset:
        if reader.offset in seen:
            raise RefusalError("its pages form a loop")
        if len(seen) >= MAX_TIFF_PAGES:
            raise RefusalError(f"has more than {MAX_TIFF_PAGES} pages or smaller copies of its page")
        seen.add(reader.offset)
        reader.step()


def check_exif(exif: bytes) -> None:
    """Check the directory of an EXIF block.

    Raises:
        RefusalError: If its values overlap many times, so that reading them would exhaust memory.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:2] in (b"II", b"MM"):
        reader = _Directories(io.BytesIO(exif), len(exif))
        if reader.offset:
            reader.step()


def check_bmp(file: BinaryIO, size: int) -> None:
    """Check the header of a BMP.

    Raises:
        RefusalError: If it is run-length-encoded and large.
    """
    file.seek(14)
    head = file.read(20)
    if len(head) == 20 and head[0] != 12 and int.from_bytes(head[16:20], "little") in (1, 2) and size > MAX_RLE_BYTES:
        raise RefusalError("is a run-length-encoded BMP of more than 4 MiB; save it as PNG")


def webp_size(file: BinaryIO) -> tuple[int, int] | None:
    """Return width and height of a WebP file from its header, or None where it is damaged.

    Raises:
        RefusalError: If it has thousands of frames.
    """
    size, position = None, 12
    for _ in range(MAX_WEBP_CHUNKS):
        file.seek(position)
        head = file.read(18)
        if len(head) < 18:
            return size
        name, length, body = head[:4], int.from_bytes(head[4:8], "little"), head[8:]
        if size is None and name == b"VP8X":
            size = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
        elif size is None and name == b"VP8 ":
            size = int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
        elif size is None and name == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        position += 8 + length + length % 2
    raise RefusalError(f"has more than {MAX_WEBP_CHUNKS:,} WebP chunks")


class _Directories:
    """Reader of the directories of a TIFF or EXIF block, one after another."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        head = file.read(16)
        self._order = ">" if head[:2] == b"MM" else "<"
        self._big = len(head) > 3 and head[2] + head[3] == 43
        # Values that do not overlap fit into the file; the pages of a pyramid share a few.
        self._allowed = 2 * size + _READ_BYTES
        self.offset = self._number(head[8:16] if self._big else head[4:8])
        """Position of the next directory, 0 after the last."""

    def step(self) -> None:
        """Check one directory and move to the next."""
        self._file.seek(self.offset)
        entry_bytes, word = (20, 8) if self._big else (12, 4)
        count = self._number(self._file.read(8 if self._big else 2))
        if count > MAX_TIFF_TAGS:
            raise RefusalError(f"has a directory of more than {MAX_TIFF_TAGS:,} tags")
        entries = self._file.read(count * entry_bytes)
        for start in range(0, len(entries) - entry_bytes + 1, entry_bytes):
            tag, kind = struct.unpack_from(self._order + "HH", entries, start)
            values = self._number(entries[start + 4 : start + 4 + word])
            if tag in _BLOCK_TAGS and values > MAX_TIFF_BLOCKS:
                raise RefusalError(f"has more than {MAX_TIFF_BLOCKS:,} strips or tiles")
            length = values * _TYPE_BYTES.get(kind, 0)
            if length > word:
                place = self._number(entries[start + 4 + word : start + 4 + 2 * word])
                # A damaged offset beyond the end of the file costs the reader nothing.
                self._allowed -= max(0, min(length, self._size - place))
            if self._allowed < 0:
                raise RefusalError("the values of its tags overlap")
        self.offset = self._number(self._file.read(word))

    def _number(self, raw: bytes) -> int:
        # A truncated number ends the chain; the reader then reports a truncated file.
        return int.from_bytes(raw, "big" if self._order == ">" else "little") if len(raw) in (2, 4, 8) else 0
