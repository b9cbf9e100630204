"""From the stored pixels of a DICOM frame to a grey or RGB image, as a viewer shows it.

Grey: modality LUT or rescale, window or VOI LUT, then inversion (MONOCHROME1). PS3.3 C.11.1, C.11.2 and C.7.6.3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.rendering import Window
from stages.dicom_files import DicomFrame, pydicom
from stages.grey_windows import Grey, linear, percentile_range, sigmoid
from stages.image_limits import RefusalError
from stages.image_remarks import BURNED_IN, SECONDARY_CAPTURE, ULTRASOUND

_GREY = ("MONOCHROME1", "MONOCHROME2")
_CAPTURE_CLASS = "1.2.840.10008.5.1.4.1.1.7"
_ULTRASOUND = ("US", "IVUS")


def dicom_remarks(header: Any) -> list[str]:
    """Return the remarks (`stages.image_remarks`) about files that often show the name of a patient in their pixels."""
    remarks = []
    if str(header.get("BurnedInAnnotation") or "").upper() == "YES":
        remarks.append(BURNED_IN)
    if header.get("Modality") in _ULTRASOUND:
        remarks.append(ULTRASOUND)
    if str(header.get("SOPClassUID") or "").startswith(_CAPTURE_CLASS):
        remarks.append(SECONDARY_CAPTURE)
    return remarks


def dicom_image(frame: DicomFrame, window: Window) -> Image.Image:
    """Return the image of a frame: mode F (0..255) for grey, RGB for colours.

    Args:
        frame: From `stages.dicom_files.read_frame`.
        window: As `schemas.rendering.Rendering.window`; colours do not depend on it.

    Raises:
        RefusalError: The colour space is not supported.
    """
    if frame.colour in _GREY:
        return Image.fromarray(_grey(frame, window))
    if frame.colour == "PALETTE COLOR":
        colours = pydicom().pixels.apply_color_lut(frame.pixels, frame.header)[..., :3]
        bits = 8 * colours.dtype.itemsize
    elif frame.colour == "RGB":
        colours, bits = frame.pixels, int(frame.header.get("BitsStored") or 8)
    else:
        raise RefusalError(f"has the colour space {frame.colour}, which is not read")
    image = Image.fromarray(_eight_bits(colours, bits))
    profile = frame.header.get("ICCProfile")
    if isinstance(profile, bytes) and profile:
        image.info["icc_profile"] = profile
    return image


def _eight_bits(colours: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if bits == 8 and colours.dtype == np.uint8:
        return np.ascontiguousarray(colours)
    highest = 2**bits - 1
    return np.rint(colours * np.float32(255 / highest)).clip(0, 255).astype(np.uint8)


def _grey(frame: DicomFrame, window: Window) -> Grey:
    header, hidden = frame.header, _padding(frame)
    values = _modality(frame.pixels, header)
    if isinstance(window, tuple):
        center, width = window
        grey = linear(values, center - width / 2, center + width / 2)
    elif window == "full":
        grey = linear(values, *_full_range(frame))
    else:
        stored = _by_file(frame, values) if window == "stored" else None
        grey = linear(values, *percentile_range(values, hidden)) if stored is None else stored
    if frame.colour == "MONOCHROME1":
        grey = 255 - grey
    if hidden is not None:
        grey[hidden] = 0
    # An extreme slope overflows.
    return np.nan_to_num(grey, copy=False)


def _padding(frame: DicomFrame) -> NDArray[np.bool_] | None:
    """Pixels outside of the image, by the padding value of the header, and floats that are not numbers; None: none."""
    hidden = None
    if frame.pixels.dtype.kind == "f":
        hidden = ~np.isfinite(frame.pixels)
        frame.pixels[hidden] = 0
    elif (value := frame.header.get("PixelPaddingValue")) is not None:
        limit = frame.header.get("PixelPaddingRangeLimit")
        ends = sorted((int(value), int(value if limit is None else limit)))
        hidden = (frame.pixels >= ends[0]) & (frame.pixels <= ends[1])
    return hidden if hidden is not None and hidden.any() else None


def _modality(pixels: NDArray[Any], header: Any) -> NDArray[Any]:
    """Apply the modality LUT, or slope and intercept."""
    if header.get("ModalityLUTSequence"):
        looked_up: NDArray[Any] = pydicom().pixels.apply_modality_lut(pixels, header)
        return looked_up
    slope, intercept = _rescale(header)
    if (slope, intercept) == (1, 0):
        return pixels
    rescaled: NDArray[Any] = pixels.astype(np.float64 if pixels.dtype.itemsize > 2 else np.float32)
    rescaled *= slope
    rescaled += intercept
    return rescaled


def _rescale(header: Any) -> tuple[float, float]:
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope is None or intercept is None:
        return 1.0, 0.0
    slope, intercept = float(slope), float(intercept)
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise RefusalError("its rescale slope or intercept is not a number")
    return slope, intercept


def _full_range(frame: DicomFrame) -> tuple[float, float]:
    """Return the range of the stored type, after the modality transformation."""
    if frame.pixels.dtype.kind == "f":
        raise RefusalError("float pixels have no known range; set features.window to percentile or [center, width]")
    if frame.header.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** int(frame.header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits, signed = int(frame.header.BitsStored), int(frame.header.get("PixelRepresentation") or 0)
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    slope, intercept = _rescale(frame.header)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return ends[0], ends[1]


def _by_file(frame: DicomFrame, values: NDArray[Any]) -> Grey | None:
    """Apply the VOI LUT or the first window of the header; None without either, unless 8 bits are stored as shown."""
    header = frame.header
    if header.get("VOILUTSequence"):
        levels = pydicom().pixels.apply_voi(values, header)
        return linear(levels, 0.0, 2.0 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    center, width = (_first_number(header, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    exact = function != "LINEAR"
    if center is None or width is None or width < (1e-6 if exact else 1):
        stored_as_shown = frame.pixels.dtype.itemsize == 1 and _rescale(header) == (1, 0)
        return linear(values, *_full_range(frame)) if stored_as_shown else None
    if function == "SIGMOID":
        return sigmoid(values, center, width)
    if not exact:
        # PS3.3 C.11.2.1.2.1: a window of width 2 shows two grey values, centred on half integers.
        center, width = center - 0.5, width - 1
    return linear(values, center - width / 2, center + width / 2)


def _first_number(header: Any, keyword: str) -> float | None:
    value = header.get(keyword)
    if value is not None and not isinstance(value, str | float | int):
        value = next(iter(value), None)
    number = None if value in (None, "") else float(value)
    return number if number is not None and math.isfinite(number) else None
