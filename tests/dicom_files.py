"""DICOM files for tests, written with pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

CT, CR, ULTRASOUND = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "1", "6.1"))
REPORT = "1.2.840.10008.5.1.4.1.1.88.11"


def dataset(pixels: np.ndarray, bits: int | None = None, sop: str = CT, **elements: Any) -> FileDataset:
    """An uncompressed image of (H, W), (H, W, 3) or, with NumberOfFrames, (N, H, W) pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, sop
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["fpt"])
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientID = "CT", "4711"
    colour = pixels.shape[-1] == 3 and pixels.ndim == 3
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return data


def save(path: Path, pixels: np.ndarray, bits: int | None = None, sop: str = CT, **elements: Any) -> Path:
    """Write an uncompressed image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(pixels, bits, sop, **elements).save_as(path)
    return path


def save_compressed(path: Path, pixels: np.ndarray, syntax: str = JPEG2000Lossless, **elements: Any) -> Path:
    """Write an image in a compressed transfer syntax that one of the installed packages encodes."""
    data = dataset(pixels, **elements)
    data.compress(syntax, generate_instance_uid=False)
    data.save_as(path)
    return path


def bundled() -> list[Path]:
    """All DICOM files that pydicom ships, without the DICOMDIR files and a folder of tiny copies of one."""
    root = Path(pydicom.__file__).parent / "data"
    found = [path for folder in ("test_files", "charset_files", "palettes") for path in (root / folder).rglob("*")]
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix in (".dcm", "") and "TINY_ALPHA" not in path.parts and path.name != "README"
    )
