"""DICOM files: the pixels are those that pydicom's own handlers give, or the file is refused by a clear message."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import bundled
from pydicom import pixels as handlers

from schemas.errors import ImageError
from stages import dicom_files
from stages.dicom_files import DECODERS
from stages.images import check_image, read_image

MAX = 10_000_000
dicom_files.pydicom()  # registers the decoder of lossless JPEG
JPEG = ("50", "51")
"""Ends of the transfer syntaxes whose decoders may round differently."""

REFUSED = {
    "JPEG2000-embedded-sequence-delimiter": "JPEG 2000 tiles",
    "MR_truncated": "the file is truncated",
    "no_meta": "is not a PNG",
}
"""Files with pixels that are refused; pydicom refuses them as well."""
NO_PICTURE = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.2"}
"""Classes with pixels that are no picture: segmentations and radiotherapy doses."""


def decoded(path: Path, plugin: str = "") -> tuple[pydicom.FileDataset, np.ndarray] | None:
    """The middle frame by pydicom with one of its decoders, or None if it gives an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = pydicom.dcmread(path, force=True)
            frames = int(data.get("NumberOfFrames") or 1)
            return data, handlers.pixel_array(data, index=frames // 2, decoding_plugin=plugin)
        except Exception:
            return None


def reference(data: pydicom.FileDataset, stored: np.ndarray) -> np.ndarray:
    """What `read_image` has to give, from the handlers of pydicom."""
    colour = data.PhotometricInterpretation
    if colour == "PALETTE COLOR":
        levels = handlers.apply_color_lut(stored, data)
        return np.rint(levels * (255 / (2 ** (8 * levels.itemsize) - 1)))
    if stored.ndim == 3:
        return np.rint(stored * (255 / (2**data.BitsStored - 1)))
    values = handlers.apply_modality_lut(stored, data)
    low, high = -(2 ** (data.BitsStored - 1)) * data.PixelRepresentation, 0
    high = low + 2**data.BitsStored - 1
    if "RescaleSlope" in data:
        low, high = (float(end * data.RescaleSlope + data.RescaleIntercept) for end in (low, high))
    if "WindowWidth" in data:
        values = handlers.apply_windowing(values, data)
    elif data.BitsAllocated > 8:
        low, high = np.percentile(values, (0.5, 99.5))
    grey = ((values - low) / ((high - low) or 1)).clip(0, 1) * 255
    if colour == "MONOCHROME1":
        grey = 255 - grey
    if "PixelPaddingValue" in data:
        grey[stored == data.PixelPaddingValue] = 0
    return grey


def plugin_of(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = pydicom.dcmread(path, force=True, stop_before_pixels=True).file_meta
    return DECODERS.get(meta.get("TransferSyntaxUID", ""), "")


def class_of(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(pydicom.dcmread(path, force=True, stop_before_pixels=True).get("SOPClassUID", ""))


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.name)
def test_bundled_files_are_read_as_pydicom_reads_them_or_refused(path: Path) -> None:
    if class_of(path) in NO_PICTURE:
        with pytest.raises(ImageError, match="DICOM segmentation, map or dose"):
            read_image(path, max_pixels=MAX)
        return
    expected = decoded(path, plugin_of(path))
    if expected is None:
        with pytest.raises(ImageError) as error:
            read_image(path, max_pixels=MAX)
        assert REFUSED.get(path.stem, "DICOM") in error.value.reason
        return
    assert path.stem not in REFUSED
    check_image(path, max_pixels=MAX)
    image = read_image(path, max_pixels=MAX)
    found = np.asarray(image, dtype=np.float64)
    assert image.mode == ("F" if found.ndim == 2 else "RGB")
    assert np.abs(found - reference(*expected)).max() < 0.01


def test_most_bundled_files_are_read() -> None:
    """The comparison above would also pass if nothing were read."""
    counts: Counter[str] = Counter()
    for path in bundled():
        try:
            read_image(path, max_pixels=MAX)
            counts["read"] += 1
        except ImageError as error:
            counts["with pixels" if path.stem in REFUSED else "without pixels" + " " * (not error.reason)] += 1
    assert counts["read"] >= 93 and counts["with pixels"] == len(REFUSED)


COMPRESSED = [path for path in bundled() if plugin_of(path) and path.stem not in REFUSED]


def syntax_of(path: Path) -> Any:
    return pydicom.dcmread(path, stop_before_pixels=True).file_meta.get("TransferSyntaxUID")


def readers(path: Path) -> list[str]:
    syntax = syntax_of(path)
    available = [] if syntax is None else list(handlers.get_decoder(syntax).available_plugins)
    return [plugin for plugin in available if decoded(path, plugin) is not None]


PAIRS = [(path, pair) for path in COMPRESSED for pair in itertools.combinations(readers(path), 2)]


@pytest.mark.parametrize(("path", "pair"), PAIRS, ids=[f"{path.stem}-{'-'.join(pair)}" for path, pair in PAIRS])
def test_two_decoders_agree(path: Path, pair: tuple[str, str]) -> None:
    first, second = (decoded(path, plugin) for plugin in pair)
    assert first is not None and second is not None
    difference = np.abs(first[1].astype(np.int64) - second[1]).max()
    assert difference <= (syntax_of(path).split(".")[-1] in JPEG)


def test_every_compressed_syntax_of_which_two_decoders_exist_is_compared() -> None:
    compared = {syntax_of(path).split(".")[-1] for path, _ in PAIRS}
    assert compared >= {"50", "70", "80", "81", "90", "91", "5"}
