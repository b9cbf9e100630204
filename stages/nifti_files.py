"""Read one axial slice of a NIfTI volume with nibabel, shown as radiologists see it: anterior up, right on the left."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import PlatformError
from schemas.rendering import Rendering
from stages.grey_windows import linear, percentile_range
from stages.image_limits import DAMAGED, TRUNCATED, RefusalError

MAX_VOLUME_BYTES = 4 * 2**30
"""Largest volume: a compressed file has to be inflated up to the slice, and some orders of axes are read completely."""

_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 544
_SIZES = {348: "Nifti1Header", 540: "Nifti2Header"}
"""Length of the header -> its class in nibabel."""


def nifti_image(file: BinaryIO, rendering: Rendering, reserve: Callable[[tuple[int, int], int], None]) -> Image.Image:
    """Return an axial slice of the first volume: mode F, 0..255.

    Slices are numbered from the lowest (inferior) one. The stored window is that of `cal_min` and `cal_max`.

    Args:
        file: The file, compressed or not, at any position.
        rendering: Window and slice.
        reserve: Called with (width, height) and the bytes per pixel that decoding takes, before anything is decoded.

    Raises:
        RefusalError: The file has no slice that is read.
        PlatformError: nibabel is not installed.
        Exception: Of nibabel, from damaged files.
    """
    nibabel = _nibabel()
    file.seek(0)
    compressed = file.read(2) == _GZIP
    file.seek(0)
    stream: Any = gzip.GzipFile(fileobj=file) if compressed else file
    try:
        header = _header(stream, nibabel)
        values = _slice(stream, header, rendering, reserve, nibabel)
    except EOFError:
        raise RefusalError(TRUNCATED) from None
    grey = linear(np.where(np.isfinite(values), values, -np.inf), *_window(values, header, rendering))
    return Image.fromarray(np.nan_to_num(grey))


def _nibabel() -> Any:
    try:
        import_module("nibabel.orientations")
        return import_module("nibabel")
    except ImportError as error:
        raise PlatformError(
            f"The package nibabel, which reads NIfTI files, cannot be imported: {error}.",
            "It is not installed with fpt.",
            'Run: pip install "fpt-vit[nifti]"',
        ) from None


def _header(stream: Any, nibabel: Any) -> Any:
    head = stream.read(_HEADER_BYTES)
    orders = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    name = next((_SIZES[size] for size in orders if size in _SIZES), None)
    if name is None:
        raise RefusalError(DAMAGED)
    kind = getattr(nibabel, name)
    length = kind.template_dtype.itemsize
    if len(head) < length:
        raise RefusalError(TRUNCATED)
    return kind(head[:length], check=False)


def _slice(
    stream: Any, header: Any, rendering: Rendering, reserve: Callable[[tuple[int, int], int], None], nibabel: Any
) -> NDArray[np.float64]:
    """Read one slice, rows from anterior to posterior, columns from right to left of the patient."""
    shape = tuple(int(side) for side in header.get_data_shape())
    dtype = header.get_data_dtype()
    if len(shape) < 2 or min(shape) < 1:
        raise RefusalError("is a NIfTI file without pixels")
    if dtype.kind not in "iuf":
        raise RefusalError(f"has pixels of the type {header.get_value_label('datatype')}, which is not read")
    volume = (*shape, 1)[:3]
    axes, ascending = _axes(header, nibabel)
    across, up, through = (axes.index(direction) for direction in range(3))
    frames = volume[through]
    number = rendering.frame_of(frames)
    if number is None:
        raise RefusalError(f"has {frames} slices, numbered from 0, so not the one that features.frame names")
    size, volume_bytes = (volume[across], volume[up]), int(np.prod(volume, dtype=np.int64)) * dtype.itemsize
    if volume_bytes > MAX_VOLUME_BYTES:
        raise RefusalError("has more than 4 GiB per volume")
    # Only the last axis is contiguous in the file.
    reserve(size, 32 if through == 2 else 32 + volume_bytes // (size[0] * size[1]))
    index: list[Any] = [slice(None)] * 3
    index[through] = number if ascending[through] else frames - 1 - number
    slope, intercept = header.get_slope_inter()
    spec = (shape, dtype, int(header.get_data_offset()), slope or 1.0, intercept or 0.0)
    proxy = nibabel.arrayproxy.ArrayProxy(stream, spec)
    plane = np.asarray(proxy[(*index[: len(shape)], *[0] * (len(shape) - 3))], dtype=np.float64)
    plane = plane if across > up else plane.T
    return plane[:: -1 if ascending[up] else 1, :: -1 if ascending[across] else 1]


def _axes(header: Any, nibabel: Any) -> tuple[list[int], list[bool]]:
    """Return the direction of each axis (0: to the right, 1: to the front, 2: up), and whether it ascends."""
    orientation = nibabel.orientations.io_orientation(header.get_best_affine())
    if np.isnan(orientation).any():
        raise RefusalError("its orientation is damaged")
    return [int(axis) for axis in orientation[:, 0]], [bool(flip > 0) for flip in orientation[:, 1]]


def _window(values: NDArray[np.float64], header: Any, rendering: Rendering) -> tuple[float, float]:
    window = rendering.window
    if isinstance(window, tuple):
        return window[0] - window[1] / 2, window[0] + window[1] / 2
    if window == "full":
        dtype = header.get_data_dtype()
        if dtype.kind == "f":
            raise RefusalError("float pixels have no known range; set features.window to percentile or [center, width]")
        slope, intercept = header.get_slope_inter()
        info = np.iinfo(dtype)
        ends = sorted(float(end) * (slope or 1.0) + (intercept or 0.0) for end in (info.min, info.max))
        return ends[0], ends[1]
    low, high = float(header["cal_min"]), float(header["cal_max"])
    if window == "stored" and np.isfinite([low, high]).all() and low < high:
        return low, high
    return percentile_range(values, ~np.isfinite(values))
