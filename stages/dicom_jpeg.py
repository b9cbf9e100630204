"""Lossless JPEG and JPEG of 12 bits inside DICOM files, decoded by libjpeg-turbo: a plug-in of pydicom.

pydicom's own plug-ins for them are gdcm, which ends the process on some damaged streams and cannot decode 12 bits, and
pylibjpeg-libjpeg, whose licence is the GPL.
"""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any

NAME = "imagecodecs"
SYNTAXES = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
"""JPEG extended, lossless, and lossless of first order."""

DECODER_DEPENDENCIES = dict.fromkeys(SYNTAXES, (NAME,))
"""Read by pydicom."""

_REGISTERING = threading.Lock()


def is_available(uid: str) -> bool:
    """Whether a transfer syntax can be decoded; called by pydicom."""
    return uid in SYNTAXES and find_spec(NAME) is not None


def decode_frame(stream: bytes, runner: Any) -> bytes:
    """Return the stored channels of a frame, without any conversion of colours; called by pydicom."""
    # Both colour spaces the same, so that libjpeg-turbo converts nothing.
    same = {"colorspace": "RGB", "outcolorspace": "RGB"} if runner.samples_per_pixel == 3 else {}
    pixels = import_module(NAME).jpeg8_decode(stream, **same)
    runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    frame: bytes = pixels.tobytes()
    return frame


def register(pixels: Any) -> None:
    """Add the plug-in to the decoders of `pydicom.pixels`."""
    with _REGISTERING:
        for uid in SYNTAXES:
            decoder = pixels.get_decoder(uid)
            if is_available(uid) and NAME not in decoder.available_plugins:
                decoder.add_plugin(NAME, (__name__, decode_frame.__name__))
