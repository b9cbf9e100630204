"""The one place where an image file becomes pixels: every stage sees the same RGB image, or the same error."""

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

from schemas.errors import ImageError
from stages.image_conversion import check_colours, take_upright, upright_copy
from stages.image_kinds import HEAD_BYTES, kind_of_bytes
from stages.image_limits import (
    DAMAGED,
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
from stages.image_streams import inspect_jpeg, jpeg_warning, tiff_warning

_READERS: dict[str, tuple[type[ImageFile], int]] = {
    "PNG": (PngImagePlugin.PngImageFile, 8),
    "JPEG": (JpegImagePlugin.JpegImageFile, 8),
    "TIFF": (TiffImagePlugin.TiffImageFile, 12),
    "BMP": (BmpImagePlugin.BmpImageFile, 8),
    "WebP": (WebPImagePlugin.WebPImageFile, 24),
}
"""Kind of a file by its first bytes -> its reader, and the bytes per pixel that decoding takes at most: the pixels as
they are decoded, the RGB image, and the buffers of the library. The suffix is not considered: a PNG named .jpg is still
an image."""

_PROGRESSIVE_BYTES = 8
"""More bytes per pixel for the coefficients of a JPEG of several scans."""

_HEADER_BYTES, _MAX_JPEG_BYTES = 8 * 2**20, 512 * 2**20
_AN = ("AVIF", "HDF5", "NRRD", "SVG")
"""Kinds whose names begin with the sound of a vowel."""

_T = TypeVar("_T")

_NEW_SUBFILE_TYPE = 0x00FE
_REDUCED, _MASK = 1, 4


@dataclass(frozen=True)
class _Limits:
    max_pixels: int
    min_side: int
    accept: Callable[[str], None] | None
    checked: bool = False


def read_image(
    path: Path, *, max_pixels: int, min_side: int = 1, accept: Callable[[str], None] | None = None
) -> Image.Image:
    """Read a PNG, JPEG, TIFF, BMP or WebP file as an upright 8-bit RGB image, completely decoded.

    - 16-bit grey is scaled from the range of its type (0..65535, or 0..4095 of a 12-bit TIFF) to 0..255 and rounded,
      never clipped; of 16-bit colour the upper byte is kept.
    - Transparent pixels are laid over black, the background of radiographs and microscopy.
    - Of animations the first frame is taken. A TIFF of several pages is refused, since nobody can say which of them is
      the image; smaller copies and masks of the first page do not count.
    - An embedded colour profile is applied (`stages.colour`): the pixels are sRGB, as the models learned them. A
      damaged one is refused.
    - A file whose checksums do not match, or of which libjpeg warns that its data is corrupt, is refused.

    Safe to call from several threads; no setting of Pillow is read or changed. All threads of the process share a
    budget of memory (`stages.image_memory`): a file waits until its pixels fit.

    Args:
        path: The file.
        max_pixels: Files whose header announces more pixels are refused before anything is decoded.
        min_side: Images with a side shorter than this, in pixels, are refused.
        accept: Called with a warning about corrupt data, and the image is used; None: it is refused.

    Returns:
        Image of mode RGB without metadata, independent of the file.

    Raises:
        ImageError: Whatever is wrong with the file, with a reason of a few words.
    """
    with ExitStack() as held:
        return _decode(path, _Limits(max_pixels, min_side, accept), held, take_upright)


@contextmanager
def decoded_image(
    path: Path,
    *,
    max_pixels: int,
    min_side: int = 1,
    accept: Callable[[str], None] | None = None,
    checked: bool = False,
) -> Iterator[Image.Image]:
    """Hold the image of `read_image`, which counts against the budget of memory until the block ends.

    Blocks of one thread must not be nested.

    Args:
        path: The file.
        max_pixels: As of `read_image`.
        min_side: As of `read_image`.
        accept: As of `read_image`.
        checked: Whether `check_image` passed the same content before: the search for corrupt data is left out.
    """
    with ExitStack() as held:
        yield _decode(path, _Limits(max_pixels, min_side, accept, checked), held, take_upright)


def check_image(path: Path, *, max_pixels: int, min_side: int = 1, accept: Callable[[str], None] | None = None) -> None:
    """Raise what `read_image` would raise; the pixels are decoded, but not converted."""
    with ExitStack() as held:
        _decode(path, _Limits(max_pixels, min_side, accept), held, check_colours)


def _decode(path: Path, limits: _Limits, held: ExitStack, use: Callable[[ImageFile], _T]) -> _T:
    """Decode a file; its memory is taken from the budget until `held` is closed."""
    try:
        # Checked first because opening a pipe would wait for a writer for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RefusalError("is a folder" if path.is_dir() else "is not a regular file")
        with path.open("rb") as file:
            return _File(file, limits, held).decode(use)
    except RefusalError as refusal:
        raise ImageError(str(path), str(refusal)) from None
    # Pillow's readers raise nearly anything on damaged bytes (SyntaxError, KeyError, struct.error, zlib.error, ...).
    except Exception as error:
        raise ImageError(str(path), _reason(error)) from error


class _File:
    """One open file on its way to pixels."""

    def __init__(self, file: BinaryIO, limits: _Limits, held: ExitStack) -> None:
        self._file, self._limits, self._held = file, limits, held
        self._size = os.fstat(file.fileno()).st_size
        self._budgeted = False

    def decode(self, use: Callable[[ImageFile], _T]) -> _T:
        head = self._file.read(HEAD_BYTES)
        if not head:
            raise RefusalError("the file is empty")
        kind = kind_of_bytes(head)
        if kind not in _READERS:
            if kind is None:
                raise RefusalError("is not a PNG, JPEG, TIFF, BMP or WebP image")
            raise RefusalError(f"is {'an' if kind in _AN else 'a'} {kind} file, which is not read yet")
        reader, bytes_per_pixel = _READERS[kind]
        bytes_per_pixel += self._check_structure(kind, bytes_per_pixel)
        self._file.seek(0)
        # The reader itself and not Image.open: that has a limit of its own, shared by the whole process, on the number
        # of pixels. No file name is given to it: it would map the file into memory, and a file cut short under a map
        # ends the process.
        with reader(self._file) as image:
            check_exif(_exif(image))
            self._reserve(image.size, bytes_per_pixel)
            if isinstance(image, TiffImagePlugin.TiffImageFile) and _has_pages(image):
                raise RefusalError("has several pages; save each as a file of its own")
            if not self._limits.checked:
                self._check_data(image)
            image.load()
            return use(image)

    def _check_structure(self, kind: str, bytes_per_pixel: int) -> int:
        """Refuse what would take far longer than its pixels need; return the bytes per pixel that come on top."""
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
            # Its reader takes the memory when it opens the file.
            self._reserve(size, bytes_per_pixel)
        return 0

    def _reserve(self, size: tuple[int, int], bytes_per_pixel: int) -> None:
        width, height = size
        check_size(size, self._limits.max_pixels, self._limits.min_side)
        if not self._budgeted:
            self._budgeted = True
            self._held.enter_context(BUDGET.hold(width * height * bytes_per_pixel))

    def _check_data(self, image: ImageFile) -> None:
        """Look for corrupt data that the reader passes over; the position in the file stays."""
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
        if warning is None:
            return
        if self._limits.accept is None:
            raise RefusalError(warning)
        self._limits.accept(warning)


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


def rgb_image(image: Image.Image, name: str, *, max_pixels: int, min_side: int = 1) -> Image.Image:
    """Convert an image in memory to the pixels that `read_image` gives for its file; the image stays as it is.

    Args:
        image: Of any mode that files are read in.
        name: Named by errors in place of a path.
        max_pixels: As of `read_image`.
        min_side: As of `read_image`.

    Raises:
        ImageError: Size or type of the pixels are refused, or the file behind the image cannot be decoded.
    """
    try:
        check_size(image.size, max_pixels, min_side)
        image.load()
        return upright_copy(image)
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
    """The EXIF block that Pillow will read, or nothing."""
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
