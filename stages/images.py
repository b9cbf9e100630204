"""Read image files. All stages use this module, so every stage gets the same RGB image or the same error."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from schemas.errors import ImageError, PlatformError
from schemas.rendering import DEFAULT_RENDERING, Rendering, Window
from stages.image_conversion import check_colours, is_dark, take_upright, upright_copy
from stages.image_kinds import HEAD_BYTES, MEDICAL, kind_of_image
from stages.image_limits import (
    DAMAGED,
    NEVER_FOLLOWED,
    TRUNCATED,
    RefusalError,
    check_bmp,
    check_exif,
    check_tiff,
    count_png_chunks,
    png_warning,
    webp_size,
)
from stages.image_memory import BUDGET
from stages.image_remarks import DARK
from stages.image_streams import inspect_jpeg, jpeg_warning, tiff_warning

_READERS: dict[str, tuple[type[ImageFile], int]] = {
    "PNG": (PngImagePlugin.PngImageFile, 8),
    "JPEG": (JpegImagePlugin.JpegImageFile, 8),
    "TIFF": (TiffImagePlugin.TiffImageFile, 12),
    "BMP": (BmpImagePlugin.BmpImageFile, 8),
    "WebP": (WebPImagePlugin.WebPImageFile, 24),
}
"""Format by the first bytes of a file -> its reader, and the most bytes per pixel that decoding takes: decoded pixels,
RGB image and buffers of the library. Suffixes are ignored: a PNG named .jpg is a valid image."""

_NOT_READ = {
    "DICOMDIR": NEVER_FOLLOWED,
    "DICOM segmentation, map or dose": "is a DICOM segmentation, map or dose, whose pixels are no picture",
}
"""Kind of DICOM file -> why it is refused, where it has more than no image."""
_PROGRESSIVE_BYTES = 8
"""Additional bytes per pixel for the coefficients of a JPEG with several scans."""

_HEADER_BYTES, _MAX_JPEG_BYTES = 8 * 2**20, 512 * 2**20
_AN = ("AVIF", "HDF5", "NRRD", "SVG")
"""Formats that take the article "an"."""

Accept = Callable[[str], None] | None
_T = TypeVar("_T")

_NEW_SUBFILE_TYPE = 0x00FE
_REDUCED, _MASK = 1, 4
"""Bits of the TIFF tag NewSubfileType."""


@dataclass(frozen=True)
class _Limits:
    max_pixels: int
    min_side: int
    accept: Accept
    checked: bool = False
    rendering: Rendering = DEFAULT_RENDERING
    remark: Accept = None


def read_image(
    path: Path,
    *,
    max_pixels: int,
    min_side: int = 1,
    accept: Accept = None,
    rendering: Rendering = DEFAULT_RENDERING,
) -> Image.Image:
    """Read a PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI file as an upright image, completely decoded.

    - Without a window, 16-bit grey of PNG and TIFF files is scaled from the range of its type (0..65535, or 0..4095 for
      a 12-bit TIFF) to 0..255 and rounded, never clipped; 16-bit colour keeps the upper byte.
    - Grey of DICOM and NIfTI files, and 16-bit grey with a window, stays a float: it is rounded after it is resized.
    - Transparent pixels are composited over black, the background of radiographs and fluorescence microscopy.
    - Animations yield their first frame. A TIFF with several pages is refused because it is unclear which page is the
      image; reduced copies and masks of the first page do not count.
    - An embedded colour profile is applied (`stages.colour`), so the pixels are sRGB, as in the models' training data.
      A damaged profile is refused.
    - A file whose checksums do not match, or whose data libjpeg reports as corrupt, is refused.

    Thread-safe; no global setting of Pillow is read or changed. All threads of the process share a memory budget
    (`stages.image_memory`): a file waits until its pixels fit.

    Args:
        path: The file.
        max_pixels: Files with more pixels according to their header are refused before anything is decoded.
        min_side: Shortest allowed side in pixels.
        accept: Called with a warning about corrupt data, after which the image is used; None refuses such images.
        rendering: Window and frame of files that leave a choice.

    Returns:
        Image of mode RGB, or F with grey values of 0..255; without metadata, independent of the file.

    Raises:
        ImageError: If the file cannot be used, with a short reason.
        PlatformError: If the package that reads its format is not installed.
    """
    with ExitStack() as memory:
        return _decode(path, _Limits(max_pixels, min_side, accept, rendering=rendering), memory, take_upright)


@contextmanager
def decoded_image(
    path: Path,
    *,
    max_pixels: int,
    min_side: int = 1,
    accept: Accept = None,
    checked: bool = False,
    rendering: Rendering = DEFAULT_RENDERING,
    remark: Accept = None,
) -> Iterator[Image.Image]:
    """Yield the image of `read_image`; it counts against the memory budget until the block ends.

    Blocks of one thread must not be nested.

    Args:
        path: The file.
        max_pixels: As for `read_image`.
        min_side: As for `read_image`.
        accept: As for `read_image`.
        checked: Whether `check_image` has accepted the same content before, so that data is not checked again.
        rendering: As for `read_image`.
        remark: Called with each remark about the file (`stages.image_remarks.EXPLAINED`).
    """
    with ExitStack() as memory:
        yield _decode(path, _Limits(max_pixels, min_side, accept, checked, rendering, remark), memory, take_upright)


def check_image(
    path: Path,
    *,
    max_pixels: int,
    min_side: int = 1,
    accept: Accept = None,
    rendering: Rendering = DEFAULT_RENDERING,
    remark: Accept = None,
) -> None:
    """Raise what `read_image` would raise; the pixels are decoded, but not all of them are converted.

    Args:
        path: The file.
        max_pixels: As for `read_image`.
        min_side: As for `read_image`.
        accept: As for `read_image`.
        rendering: As for `read_image`.
        remark: As for `decoded_image`.
    """
    with ExitStack() as memory:
        limits = _Limits(max_pixels, min_side, accept, rendering=rendering, remark=remark)
        _decode(path, limits, memory, check_colours)


def _decode(path: Path, limits: _Limits, memory: ExitStack, use: Callable[[Image.Image, Window | None], _T]) -> _T:
    """Decode a file and return `use(image)`; its memory counts against the budget until `memory` is closed."""
    try:
        # Checked first, because opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RefusalError("is a folder" if path.is_dir() else "is not a regular file")
        with path.open("rb") as file:
            return _OpenImage(file, limits, memory).decode(use)
    except RefusalError as refusal:
        raise ImageError(str(path), str(refusal)) from None
    except PlatformError:
        raise
    # Readers raise nearly anything on damaged bytes (SyntaxError, KeyError, struct.error, zlib.error, ...).
    except Exception as error:
        raise ImageError(str(path), _reason(error)) from error


class _OpenImage:
    """Decoder of one open image file."""

    def __init__(self, file: BinaryIO, limits: _Limits, memory: ExitStack) -> None:
        self._file, self._limits, self._memory = file, limits, memory
        self._size = os.fstat(file.fileno()).st_size
        self._budgeted = False

    def decode(self, use: Callable[[Image.Image, Window | None], _T]) -> _T:
        head = self._file.read(HEAD_BYTES)
        if not head:
            raise RefusalError("the file is empty")
        kind = kind_of_image(head, str(self._file.name))
        if kind in MEDICAL:
            return use(self._nifti() if kind == "NIfTI" else self._dicom(), None)
        if kind not in _READERS:
            if kind is None:
                raise RefusalError("is not a PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI image")
            if kind.startswith("DICOM"):
                raise RefusalError(_NOT_READ.get(kind, "is a DICOM file without an image"))
            raise RefusalError(f"is {'an' if kind in _AN else 'a'} {kind} file, which is not read yet")
        reader, bytes_per_pixel = _READERS[kind]
        bytes_per_pixel += self._check_structure(kind, bytes_per_pixel)
        self._file.seek(0)
        # Not Image.open, whose pixel limit is global to the process. Not by file name: Pillow would map the file into
        # memory, and a mapped file that is truncated meanwhile kills the process.
        with reader(self._file) as image:
            check_exif(_exif(image))
            self._reserve(image.size, bytes_per_pixel)
            if isinstance(image, TiffImagePlugin.TiffImageFile) and _has_pages(image):
                raise RefusalError("has several pages; save each as a file of its own")
            if not self._limits.checked:
                self._check_data(image)
            image.load()
            window = self._limits.rendering.window
            if self._limits.remark is not None and window == "stored" and is_dark(image):
                self._limits.remark(DARK)
            return use(image, window)

    def _nifti(self) -> Image.Image:
        # Imported late: most data sets need it as little as the package that reads it.
        from stages.nifti_files import nifti_image

        return nifti_image(self._file, self._limits.rendering, self._reserve)

    def _dicom(self) -> Image.Image:
        from stages.dicom_files import read_frame
        from stages.dicom_pixels import dicom_image, dicom_remarks

        rendering = self._limits.rendering
        frame = read_frame(self._file, self._size, rendering.frame_of, self._reserve, self._handle)
        if self._limits.remark is not None:
            for remark in dicom_remarks(frame.header):
                self._limits.remark(remark)
        return dicom_image(frame, rendering.window)

    def _check_structure(self, kind: str, bytes_per_pixel: int) -> int:
        """Refuse files that take too long to decode; return the additional bytes per pixel that decoding needs."""
        if kind == "JPEG":
            self._file.seek(0)
            structure = inspect_jpeg(self._file.read(_HEADER_BYTES))
            if self._size > _HEADER_BYTES and not structure.scans:
                raise RefusalError("has more than 8 MiB before its pixels")
            return _PROGRESSIVE_BYTES if structure.progressive else 0
        if kind == "PNG":
            count_png_chunks(self._file)
        elif kind == "TIFF":
            check_tiff(self._file, self._size)
        elif kind == "BMP":
            check_bmp(self._file, self._size)
        elif kind == "WebP" and (size := webp_size(self._file)) is not None:
            # The WebP reader allocates its memory when it opens the file.
            self._reserve(size, bytes_per_pixel)
        return 0

    def _reserve(self, size: tuple[int, int], bytes_per_pixel: int) -> None:
        width, height = size
        check_size(size, self._limits.max_pixels, self._limits.min_side)
        if not self._budgeted:
            self._budgeted = True
            self._memory.enter_context(BUDGET.hold(width * height * bytes_per_pixel))

    def _check_data(self, image: ImageFile) -> None:
        """Check for corrupt data that Pillow's reader ignores; the position in the file is restored."""
        position = self._file.tell()
        warning = None
        if isinstance(image, PngImagePlugin.PngImageFile):
            warning = png_warning(self._file)
        elif isinstance(image, TiffImagePlugin.TiffImageFile):
            warning = tiff_warning(image, self._file)
        elif isinstance(image, JpegImagePlugin.JpegImageFile):
            if self._size > _MAX_JPEG_BYTES:
                raise RefusalError("is a JPEG of more than 512 MiB")
            self._file.seek(0)
            data = self._file.read(_MAX_JPEG_BYTES)
            if self._size > _HEADER_BYTES:
                inspect_jpeg(data)
            warning = jpeg_warning(data, len(image.getbands()))
        self._file.seek(position)
        self._handle(warning)

    def _handle(self, warning: str | None) -> None:
        """Refuse corrupt data, or pass the warning on."""
        if warning is None or self._limits.checked:
            return
        if self._limits.accept is None:
            raise RefusalError(warning)
        self._limits.accept(warning)


def _has_pages(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether a second page exists that is neither a reduced copy of the first (as in pyramids) nor its mask."""
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


def rgb_image(
    image: Image.Image,
    name: str,
    *,
    max_pixels: int,
    min_side: int = 1,
    rendering: Rendering = DEFAULT_RENDERING,
) -> Image.Image:
    """Convert an image in memory to the pixels that `read_image` gives for its file; the image stays as it is.

    Args:
        image: Of any mode that files are read in.
        name: Named by errors in place of a path.
        max_pixels: As of `read_image`.
        min_side: As of `read_image`.
        rendering: As of `read_image`.

    Raises:
        ImageError: Size or type of the pixels are refused, or the file behind the image cannot be decoded.
    """
    try:
        check_size(image.size, max_pixels, min_side)
        image.load()
        return upright_copy(image, rendering.window)
    except RefusalError as refusal:
        raise ImageError(name, str(refusal)) from None
    # Pillow's readers raise nearly anything on damaged bytes.
    except Exception as error:
        raise ImageError(name, _reason(error)) from error


def check_size(size: tuple[int, int], max_pixels: int, min_side: int) -> None:
    """Refuse an image that has too many pixels, or a side that is too short.

    Raises:
        RefusalError: Naming the setting.
    """
    width, height = size
    if width * height > max_pixels:
        raise RefusalError(f"{width} x {height} pixels are more than data.max_pixels allows ({max_pixels:,})")
    if min(width, height) < min_side:
        raise RefusalError(f"{width} x {height} pixels: a side is shorter than data.min_side ({min_side})")


def _exif(image: ImageFile) -> bytes:
    """Return the EXIF block that Pillow will read, empty if the image has none."""
    profile = image.info.get("Raw profile type exif")
    if image.info.get("exif") is None and profile is not None:
        try:
            return bytes.fromhex("".join(str(profile).split("\n")[3:]))
        except ValueError:
            return b""
    return bytes(image.info.get("exif") or b"")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return {FileNotFoundError: "no such file", PermissionError: "permission denied"}.get(
            type(error), os.strerror(error.errno).lower()
        )
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return "too large to be decoded"
    if isinstance(error, OSError) and "truncated" in str(error):
        return TRUNCATED
    if isinstance(error, SyntaxError):
        return "the header is damaged or truncated"
    return DAMAGED
