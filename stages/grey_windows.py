"""Map grey values of any type and range to 0..255, kept as floats until the image has been resized."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
"""(height, width), any real type."""

PERCENTILES = (0.5, 99.5)
"""Percentiles of an image that become black and white: a few extreme pixels, such as markers, do not set the window."""

Grey = NDArray[np.float32]
"""(height, width), 0..255."""


def percentile_range(values: Values, hidden: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """Return the grey values at `PERCENTILES` of an image, or its lowest and highest where the two are equal.

    Args:
        values: (height, width), any real type.
        hidden: Pixels that do not count, or None.
    """
    shown = values.ravel() if hidden is None else values[~hidden]
    if not shown.size:
        return 0.0, 0.0
    low, high = (float(value) for value in np.percentile(shown, PERCENTILES))
    return (low, high) if low < high else (float(shown.min()), float(shown.max()))


def linear(values: Values, low: float, high: float) -> Grey:
    """Map low..high to 0..255 and clip; with low == high, everything above is white."""
    exact = values.dtype.itemsize <= 2 or values.dtype == np.float32
    grey: Values = values.astype(np.float32 if exact else np.float64)
    if low >= high:
        return np.where(grey > high, np.float32(255), np.float32(0))
    grey -= low
    grey *= 255 / (high - low)
    return grey.clip(0, 255, out=grey).astype(np.float32, copy=False)


def sigmoid(values: Values, center: float, width: float) -> Grey:
    """Map by the sigmoid function of DICOM (PS3.3 C.11.2.1.3.1)."""
    slope = (values.astype(np.float64) - center) * (-4 / width)
    grey: Grey = (255 / (1 + np.exp(slope.clip(-500, 500)))).astype(np.float32)
    return grey
