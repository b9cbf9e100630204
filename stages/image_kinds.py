"""Identify file formats by their first bytes: readable images, and the names of formats that are not supported."""

from __future__ import annotations

import os
import re
import stat
import zlib
from pathlib import Path
from typing import Literal

READABLE = ("PNG", "JPEG", "TIFF", "BMP", "WebP")
"""Formats that `stages.images` decodes with Pillow."""

MEDICAL = ("DICOM", "NIfTI")
"""Formats that `stages.images` decodes with packages that are not installed with fpt."""

_CLASS = rb"(?s)(\x02\x00\x02\x00|\x08\x00\x16\x00|\x00\x08\x00\x16)(UI..|....)1\.2\.840\.10008\."
"""Class of an object in DICOM, (0002,0002) or (0008,0016), up to the number of the standard's root."""
_WITHOUT_PIXELS = {
    "DICOMDIR": re.compile(_CLASS + rb"1\.3\.10"),
    "DICOM without an image": re.compile(
        _CLASS
        + rb"5\.1\.4\.(3[4-9]\.|4[3-5]\.|1\.1\.(88\.|11\.|104\.|9\.|481\.([3-9]|1[0-9]|2[0-9])|66\.[12356]|66[^.0-9]"
        rb"|67[^.0-9]|68\.|7[89]\.|80\.|90\.|200\.|77\.1\.5\.3))"
    ),
    "DICOM segmentation, map or dose": re.compile(_CLASS + rb"5\.1\.4\.1\.1\.(66\.[478]|30[^.0-9]|481\.2[^0-9])"),
}
"""Kind of DICOM file that is no image -> its class: directories; palettes, protocols, structured reports, presentation
states, documents, waveforms, contours and plans of radiotherapy, raw data, measurements; results whose pixels are no
picture."""

HEAD_BYTES = 1024
"""Bytes that `kind_of_bytes` needs to recognise every format."""

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (128, b"DICM", "DICOM"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"II\x2a\x00", "TIFF"),
    (0, b"MM\x00\x2a", "TIFF"),
    (0, b"II\x2b\x00", "TIFF"),
    (0, b"MM\x00\x2b", "TIFF"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (344, b"n+1\x00", "NIfTI"),
    (344, b"ni1\x00", "NIfTI pair"),
    (4, b"n+2\x00\r\n\x1a\n", "NIfTI"),
    (4, b"ni2\x00\r\n\x1a\n", "NIfTI pair"),
    (0, b"NRRD000", "NRRD"),
    (0, b"ObjectType = Image", "MetaImage"),
    (0, b"%PDF-", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
)
"""(offset, bytes, format). DICOM comes first because its preamble may be the header of another format (PS3.10 7.5)."""

_NO_IMAGES = frozenset({"PDF", "NumPy", "HDF5", "ZIP", "gzip"})
"""Formats that are named in messages about an expected image, but are not images when a folder is searched."""

_BY_SUFFIX = {
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "DICOM"),
    **dict.fromkeys((".nii", ".nii.gz"), "NIfTI"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NRRD"),
    # By their first bytes these are TIFF files, whose first page is often a small preview of the photograph.
    **dict.fromkeys((".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".pef", ".raf"), "camera raw"),
}
"""Formats that cannot always be identified by the first bytes."""

_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)
"""Major brand of an ISO base media file -> format."""

_SVG = re.compile(rb"\s*(<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE[^>]*>|\s)*<svg[\s>]", re.DOTALL)
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


def kind_of(path: Path) -> str | None:
    """Return the format of a file by its content and not by its name; nothing is decoded.

    Pipes, devices, sockets and folders are never opened.

    Returns:
        "PNG", "JPEG", "DICOM", ...; None for an unknown format and for anything but a regular file.

    Raises:
        OSError: If the file is missing or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    # Non-blocking, in case a pipe has replaced the file since the line above.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:  # noqa: PTH123
        return kind_of_bytes(file.read(HEAD_BYTES))


def kind_of_image(head: bytes, name: str) -> str | None:
    """Return the format by which an image is read: TIFF of a file that is TIFF and DICOM, if its name says TIFF."""
    kind = kind_of_bytes(head)
    named_tiff = kind == "DICOM" and name.lower().endswith((".tif", ".tiff"))
    return kind_of_bytes(head[:128]) or kind if named_tiff else kind


def image_kind(path: Path) -> str | None:
    """Return the image format of a file, by its suffix for a few formats, else by its content.

    Returns:
        Format such as "PNG" or "DICOM"; None if the file is not an image.

    Raises:
        OSError: If the file is missing or cannot be read.
    """
    name = path.name.strip().lower()
    by_suffix = next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), None)
    kind = kind_of(path) if by_suffix in (None, *MEDICAL) else by_suffix
    # A damaged file with the suffix of a format has to be reported.
    kind = kind or by_suffix
    return None if kind in _NO_IMAGES else kind


def is_read(kind: str) -> bool:
    """Whether `stages.images.read_image` reads this format."""
    return kind in READABLE or kind in MEDICAL


def kind_of_bytes(head: bytes) -> str | None:
    """Return the format of a file by its first `HEAD_BYTES` bytes (fewer if the file is shorter)."""
    for offset, signature, kind in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature and (kind != "WebP" or head.startswith(b"RIFF")):
            if kind == "DICOM":
                return _kind_of_dicom(head)
            return "NIfTI" if kind == "gzip" and kind_of_bytes(_unzipped(head)) == "NIfTI" else kind
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    # Text may start with "BM" too, so the size of the header is compared as well.
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if _starts_data_set(head):
        return _kind_of_dicom(head)
    return "SVG" if _SVG.match(head.removeprefix(b"\xef\xbb\xbf")) else None


def _kind_of_dicom(head: bytes) -> str:
    return next((kind for kind, uid in _WITHOUT_PIXELS.items() if uid.search(head)), "DICOM")


_SHORT_VALUES = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
"""Value representations with a length of two bytes (PS3.5 7.1.2)."""
_FIRST_GROUPS = (0x0002, 0x0008)


def _starts_data_set(head: bytes) -> bool:
    """Whether a file starts with two elements of a DICOM data set, as files of old devices do, without a preamble."""
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    for order in orders:
        previous, position = (0, 0), 0
        for _ in range(2):
            length, size = _element_length(head[position : position + 8], order)
            group, element = (int.from_bytes(head[position + at : position + at + 2], order) for at in (0, 2))
            if not size or group not in _FIRST_GROUPS or (group, element) < previous or element > 0x2000:
                break
            previous, position = (group, element + 1), position + 8 + length
        else:
            return True
    return False


def _element_length(head: bytes, order: Literal["little", "big"]) -> tuple[int, bool]:
    """Return the length of the first elements' values, and whether it is plausible."""
    if len(head) < 8:
        return 0, False
    explicit = head[4:6] in _SHORT_VALUES
    length = int.from_bytes(head[6:8] if explicit else head[4:8], order)
    return length, length % 2 == 0 and length <= HEAD_BYTES // 2 and (explicit or order == "little")


def _unzipped(head: bytes) -> bytes:
    try:
        # Only the first member, and no more of it than the longest signature needs.
        return zlib.decompressobj(wbits=31).decompress(head, 512)
    except zlib.error:
        return b""
