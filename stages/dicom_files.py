"""Read DICOM files with pydicom: a few elements of the header, and the stored pixels of one frame.

Each transfer syntax has one decoder, so that the pixels do not depend on what else is installed. DICOMDIR files are
refused, and no other file that a header refers to is ever opened.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, BinaryIO

from numpy.typing import NDArray

from schemas.errors import PlatformError
from stages import dicom_jpeg
from stages.dicom_streams import check_frame
from stages.image_limits import DAMAGED, NEVER_FOLLOWED, TRUNCATED, RefusalError

_PALETTE = ("Red", "Green", "Blue")
_DISPLAY = (
    *("SOPClassUID", "Modality", "NumberOfFrames", "BurnedInAnnotation", "ICCProfile"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("TotalPixelMatrixColumns", "TotalPixelMatrixRows", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(
        f"{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for part in ("Descriptor", "Data")
    ),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
)
"""Elements that pixels depend on, and those that `dicom_remarks` names; no others are read."""

_JPEG, _JPEG_LS, _JPEG_2000 = "pillow", "pyjpegls", "pylibjpeg"
DECODERS = {
    "1.2.840.10008.1.2.4.50": _JPEG,
    **dict.fromkeys(dicom_jpeg.SYNTAXES, dicom_jpeg.NAME),
    "1.2.840.10008.1.2.4.80": _JPEG_LS,
    "1.2.840.10008.1.2.4.81": _JPEG_LS,
    "1.2.840.10008.1.2.4.90": _JPEG_2000,
    "1.2.840.10008.1.2.4.91": _JPEG_2000,
    "1.2.840.10008.1.2.4.201": _JPEG_2000,
    "1.2.840.10008.1.2.4.202": _JPEG_2000,
    "1.2.840.10008.1.2.4.203": _JPEG_2000,
    "1.2.840.10008.1.2.5": "pylibjpeg",
}
"""UID of each compressed transfer syntax that is read -> its decoder, a plug-in of pydicom."""

_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = _NATIVE
_DEFLATED = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
"""Element of the transfer syntax of deflated files."""
_MAX_INFLATED = 512 * 2**20
"""Most bytes of a deflated data set, which has to be in memory."""
_DIRECTORY = "1.2.840.10008.1.3.10"
_UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_ELEMENTS = {0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData", 0x0010: "PixelData"}
_PIXEL_TYPES = (b"OB", b"OW", b"OF", b"OD", b"UN")


@dataclass(frozen=True)
class DicomFrame:
    """Stored pixels of one frame."""

    pixels: NDArray[Any]
    """(height, width) or (height, width, 3), of the stored type; colours are RGB."""
    header: Any
    """`pydicom.Dataset` of the elements that pixels depend on; for this frame, if it has several."""
    colour: str
    """Photometric interpretation of `pixels`."""


@cache
def pydicom() -> Any:
    """Import pydicom, and keep its remarks about files of others from the terminal.

    Raises:
        PlatformError: It is not installed.
    """
    try:
        package = import_module("pydicom")
        dicom_jpeg.register(import_module("pydicom.pixels"))
    except ImportError as error:
        raise PlatformError(
            f"The package pydicom, which reads DICOM files, cannot be imported: {error}.",
            "It is not installed with fpt.",
            'Run: pip install "fpt-vit[dicom]"',
        ) from None
    logging.getLogger("pydicom").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    return package


def read_frame(
    file: BinaryIO,
    size: int,
    frame_of: Callable[[int], int | None],
    reserve: Callable[[tuple[int, int], int], None],
    warn: Callable[[str | None], None],
) -> DicomFrame:
    """Read the pixels of one frame.

    Args:
        file: The file, at any position.
        size: Length of the file in bytes.
        frame_of: Number of frames -> the one to read, from 0, or None if there is no such frame.
        reserve: Called with (width, height) and the bytes per pixel that decoding takes, before anything is decoded.
        warn: Called with the warning about corrupt data, or None, before anything is decoded.

    Raises:
        RefusalError: The file has no pixels that are read.
        PlatformError: pydicom is not installed.
        Exception: Of pydicom, from damaged files.
    """
    file, header, syntax = open_header(file, size, _DISPLAY)
    shape = _shape(header)
    frames = max(1, int(header.get("NumberOfFrames") or 1))
    index = frame_of(frames)
    if index is None:
        raise RefusalError(f"has {frames} frames, numbered from 0, so not the one that features.frame names")
    options = _pixel_options(file, header, syntax)
    reserve(shape.size, _decoded_bytes(shape, header))
    if syntax in _NATIVE:
        _check_length(shape, header, index, _left(file))
        plugin = ""
    else:
        plugin = _plugin(syntax)
        warn(_check_compressed(file, header, syntax, shape, index, frames))
    decoder = pydicom().pixels.get_decoder(syntax)
    try:
        pixels, properties = decoder.as_array(file, index=index, validate=True, decoding_plugin=plugin, **options)
    except BaseException as error:
        # A panic of pylibjpeg-rle on damaged data is no Exception.
        raise (RefusalError(DAMAGED) if type(error).__name__ == "PanicException" else error) from None
    expected = (shape.height, shape.width) if shape.samples == 1 else (shape.height, shape.width, shape.samples)
    if pixels.shape != expected:
        raise RefusalError(DAMAGED)
    return DicomFrame(pixels, _of_frame(header, index), str(properties["photometric_interpretation"]))


def open_header(file: BinaryIO, size: int, keywords: tuple[str, ...]) -> tuple[BinaryIO, Any, str]:
    """Read elements of the header by their keywords.

    Returns:
        The file, at the element with its pixels (a buffer, if the file is deflated), the `pydicom.Dataset`, and the
        UID of the transfer syntax.

    Raises:
        RefusalError: It is a DICOMDIR, or inflates to more than 512 MiB.
        PlatformError: pydicom is not installed.
    """
    package = pydicom()
    file.seek(0)
    tags = [package.datadict.tag_for_keyword(keyword) for keyword in keywords]
    head = file.read(1024)
    if _DIRECTORY.encode() in head:
        raise RefusalError(NEVER_FOLLOWED)
    file.seek(0)
    deflated = _DEFLATED in head
    if deflated:
        file = _inflated(file, head, size)
    header = package.dcmread(file, force=True, stop_before_pixels=True, specific_tags=tags)
    stated = header.file_meta.get("TransferSyntaxUID") if not deflated else _EXPLICIT
    return file, header, str(stated or _guessed_syntax(header))


def _guessed_syntax(header: Any) -> str:
    implicit, little = header.original_encoding
    return _IMPLICIT if implicit else _EXPLICIT if little else _BIG_ENDIAN


def _inflated(file: BinaryIO, head: bytes, size: int) -> io.BytesIO:
    """Inflate a data set (PS3.5 A.5); pydicom's own inflation has no limit."""
    if head[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise RefusalError(DAMAGED)
    file.seek(144 + int.from_bytes(head[140:144], "little"))
    inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    data = inflate.decompress(file.read(size), _MAX_INFLATED)
    if inflate.unconsumed_tail:
        raise RefusalError("inflates to more than 512 MiB")
    return io.BytesIO(data)


@dataclass(frozen=True)
class _Shape:
    width: int
    height: int
    samples: int
    bits: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def _shape(header: Any) -> _Shape:
    width, height = header.get("Columns"), header.get("Rows")
    if not width or not height:
        raise RefusalError("is a DICOM file without pixels")
    matrix = header.get("TotalPixelMatrixColumns"), header.get("TotalPixelMatrixRows")
    if (matrix[0] or 0) > int(width) or (matrix[1] or 0) > int(height):
        raise RefusalError("is a slide in tiles, of which a frame shows one; export the region of interest as an image")
    samples = int(header.get("SamplesPerPixel") or 1)
    if samples not in (1, 3):
        raise RefusalError(f"has {samples} channels per pixel")
    return _Shape(int(width), int(height), samples, int(header.get("BitsAllocated") or 8))


def _decoded_bytes(shape: _Shape, header: Any) -> int:
    """Bytes per pixel: the output of a decoder, its array, and grey values as floats."""
    stored = -(-shape.bits // 8) * shape.samples
    lookup = 8 if "ModalityLUTSequence" in header or "VOILUTSequence" in header else 0
    return 3 * stored + 8 + lookup + (8 if stored > 2 else 0)


def _pixel_options(file: BinaryIO, header: Any, syntax: str) -> dict[str, Any]:
    """Read the head of the element with the pixels, and return the options of pydicom's decoders."""
    little, head = syntax != _BIG_ENDIAN, file.read(8)
    if len(head) < 8:
        raise RefusalError("is a DICOM file without pixels" if not head else TRUNCATED)
    group, element = struct.unpack("<HH" if little else ">HH", head[:4])
    keyword = _PIXEL_ELEMENTS.get(element)
    if group != 0x7FE0 or keyword is None:
        raise RefusalError("is a DICOM file without pixels")
    length, representation = head[4:8], {}
    # Not by the transfer syntax, which some writers contradict. As a length these letters would be an odd number.
    if head[4:6] in _PIXEL_TYPES:
        representation = {"pixel_vr": head[4:6].decode()}
        length = file.read(4)
    compressed = int.from_bytes(length, "little" if little else "big") == _UNDEFINED_LENGTH
    if compressed == (syntax in _NATIVE):
        raise RefusalError("its transfer syntax does not fit its pixels")
    options = pydicom().pixels.utils.as_pixel_options(header, **representation)
    return {**options, "pixel_keyword": keyword, "transfer_syntax_uid": pydicom().uid.UID(syntax)}


def _left(file: BinaryIO) -> int:
    """Return the number of bytes after the position in the file."""
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(position)
    return end - position


def _check_length(shape: _Shape, header: Any, index: int, left: int) -> None:
    """Refuse uncompressed pixels that are not all there, before memory is allocated for them."""
    bits = shape.width * shape.height * shape.samples * shape.bits
    if header.get("PhotometricInterpretation") == "YBR_FULL_422":
        bits = bits * 2 // 3
    if (index + 1) * bits > left * 8:
        raise RefusalError(TRUNCATED)


def _plugin(syntax: str) -> str:
    """Return the decoder of a compressed transfer syntax."""
    name = pydicom().uid.UID(syntax).name
    plugin = DECODERS.get(syntax)
    if plugin is None:
        raise RefusalError(f"has the transfer syntax {name}, which is not read")
    if plugin not in pydicom().pixels.get_decoder(syntax).available_plugins:
        extra = "jpeg" if plugin == dicom_jpeg.NAME else "dicom"
        raise RefusalError(f'has the transfer syntax {name}, which needs: pip install "fpt-vit[{extra}]"')
    return plugin


def _check_compressed(file: BinaryIO, header: Any, syntax: str, shape: _Shape, index: int, frames: int) -> str | None:
    """Check the compressed frame; the position in the file is restored."""
    start = file.tell()
    offsets = None
    if "ExtendedOffsetTable" in header and "ExtendedOffsetTableLengths" in header:
        offsets = header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths
    data = pydicom().encaps.get_frame(file, index, extended_offsets=offsets, number_of_frames=frames)
    file.seek(start)
    return check_frame(data, syntax, shape.size, shape.samples)


_OF_FRAMES = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
"""Sequence of an enhanced multi-frame file -> its elements, which other files have at the top (PS3.3 C.7.6.16)."""


def _of_frame(header: Any, index: int) -> Any:
    """Copy the elements of one frame of an enhanced multi-frame file to the top of its header."""
    groups = [*(header.get("SharedFunctionalGroupsSequence") or [])[:1]]
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    groups += per_frame[index : index + 1]
    for group in groups:
        for sequence, keywords in _OF_FRAMES.items():
            for item in (group.get(sequence) or [])[:1]:
                for keyword in keywords:
                    if keyword in item:
                        header[keyword] = item[keyword]
    return header
