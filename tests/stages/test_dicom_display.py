"""How DICOM pixels become grey values and colours: windows, frames, padding, limits."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_files import dataset, save, save_compressed
from image_files import reason
from PIL import Image, ImageCms
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from schemas.errors import ImageError, PlatformError
from schemas.rendering import Rendering
from stages import dicom_files
from stages.dicom_streams import check_frame
from stages.image_limits import RefusalError
from stages.image_remarks import BURNED_IN, SECONDARY_CAPTURE, ULTRASOUND
from stages.images import check_image, read_image

MAX = 10_000_000
RAMP = np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32)


def grey(path: Path, **rendering: Any) -> np.ndarray:
    image = read_image(path, max_pixels=MAX, rendering=Rendering(**rendering))
    assert image.mode == "F"
    return np.asarray(image)


def test_the_first_window_of_the_file_is_used(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", RAMP, 12, WindowCenter=[2048, 100], WindowWidth=[1001, 10])
    values = grey(path)
    assert np.allclose(values, ((RAMP - 2047.5) / 1000 + 0.5).clip(0, 1) * 255, atol=1e-3)
    assert len(np.unique(values)) > 245  # not rounded to 8 bits


@pytest.mark.parametrize(
    ("window", "low", "high"),
    [("full", 0, 4095), ("percentile", *np.percentile(RAMP, (0.5, 99.5))), ((1000.0, 500.0), 750, 1250)],
)
def test_a_window_of_the_settings_replaces_it(tmp_path: Path, window: Any, low: float, high: float) -> None:
    path = save(tmp_path / "a.dcm", RAMP, 12, WindowCenter=2048, WindowWidth=1001)
    assert np.allclose(
        grey(path, window=window), ((RAMP.astype(float) - low) / (high - low)).clip(0, 1) * 255, atol=1e-3
    )


def test_a_window_is_in_hounsfield_units(tmp_path: Path) -> None:
    hounsfield = np.linspace(-1000, 1000, 1024).astype(np.int16).reshape(32, 32)
    path = save(tmp_path / "a.dcm", hounsfield + 1024, RescaleSlope=1, RescaleIntercept=-1024)
    assert np.allclose(grey(path, window=(40.0, 400.0)), ((hounsfield + 160) / 400).clip(0, 1) * 255, atol=1e-3)


def test_functions_and_lookup_tables_of_windows(tmp_path: Path) -> None:
    window = {"WindowCenter": 2048, "WindowWidth": 1000}
    exact = grey(save(tmp_path / "a.dcm", RAMP, 12, **window, VOILUTFunction="LINEAR_EXACT"))
    assert np.allclose(exact, ((RAMP - 1548.0) / 1000).clip(0, 1) * 255, atol=1e-3)
    sigmoid = grey(save(tmp_path / "a.dcm", RAMP, 12, **window, VOILUTFunction="SIGMOID"))
    assert np.allclose(sigmoid, 255 / (1 + np.exp(-4 * (RAMP - 2048.0) / 1000)), atol=1e-3)
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.LUTData = ((np.arange(4096) // 4) ^ 1023).astype(np.uint16).tobytes()
    looked_up = grey(save(tmp_path / "a.dcm", RAMP, 12, **window, VOILUTSequence=[table]))
    assert np.allclose(looked_up, ((RAMP // 4) ^ 1023) * 255.0 / 1023, atol=1e-3)


@pytest.mark.parametrize("width", [0, -5])
def test_a_window_without_width_is_ignored(tmp_path: Path, width: int) -> None:
    path = save(tmp_path / "a.dcm", RAMP, 12, WindowCenter=10, WindowWidth=width)
    assert np.array_equal(grey(path), grey(path, window="percentile"))


def test_padding_is_black_and_does_not_count(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.int16)
    padded = pixels.copy()
    padded[:16] = -2000
    for colour in ("MONOCHROME1", "MONOCHROME2"):
        path = save(tmp_path / "a.dcm", padded, 16, PixelPaddingValue=-2000, PhotometricInterpretation=colour)
        values = grey(path)
        assert (values[:16] == 0).all()
        low, high = np.percentile(pixels[16:], (0.5, 99.5))
        shown = ((pixels[16:] - low) / (high - low)).clip(0, 1) * 255
        assert np.allclose(values[16:], 255 - shown if colour == "MONOCHROME1" else shown, atol=1e-3)
    path = save(tmp_path / "a.dcm", padded, 16, PixelPaddingValue=-2000, PixelPaddingRangeLimit=2500)
    assert (grey(path)[pixels <= 2500] == 0).all()


def test_float_pixels(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32)
    values[0, 0] = np.nan
    data = dataset(np.zeros((32, 32), np.uint32))
    del data.PixelData, data.BitsStored, data.HighBit, data.PixelRepresentation
    data.FloatPixelData = values.tobytes()
    data.save_as(tmp_path / "a.dcm")
    shown = grey(tmp_path / "a.dcm", window=(0.0, 1.0))
    assert shown[0, 0] == 0
    assert np.allclose(shown.ravel()[1:], ((values.ravel()[1:] + 0.5) / 1).clip(0, 1) * 255, atol=1e-3)
    with pytest.raises(ImageError, match="no known range"):
        grey(tmp_path / "a.dcm", window="full")


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    plain, inverted = (
        grey(save(tmp_path / "a.dcm", RAMP, 12, PhotometricInterpretation=colour), window="full")
        for colour in ("MONOCHROME2", "MONOCHROME1")
    )
    assert np.allclose(plain + inverted, 255)


@pytest.mark.parametrize(("frame", "number"), [("first", 0), ("middle", 2), (4, 4)])
def test_a_frame_is_chosen(tmp_path: Path, frame: Any, number: int) -> None:
    frames = np.stack([np.full((20, 30), 10 * index, np.uint8) for index in range(5)])
    path = save(tmp_path / "a.dcm", frames, NumberOfFrames=5)
    assert (grey(path, frame=frame) == 10 * number).all()
    assert (grey(save(tmp_path / "b.dcm", frames[3]), frame=frame) == 30).all()


def test_a_frame_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", np.zeros((5, 20, 30), np.uint8), NumberOfFrames=5)
    with pytest.raises(ImageError, match=r"has 5 frames, numbered from 0, so not the one that features\.frame names"):
        grey(path, frame=5)


def test_frames_of_an_enhanced_file_have_windows_of_their_own(tmp_path: Path) -> None:
    groups = []
    for index in range(3):
        group, window, rescale = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = 1000 * (index + 1), 401
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, 100 * index
        group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [rescale]
        groups.append(group)
    frames = np.stack([RAMP] * 3)
    path = save(tmp_path / "a.dcm", frames, 12, NumberOfFrames=3, PerFrameFunctionalGroupsSequence=groups)
    for index in range(3):
        shown = ((RAMP + 100.0 * index - (1000 * (index + 1) - 0.5)) / 400 + 0.5).clip(0, 1) * 255
        assert np.allclose(grey(path, frame=index), shown, atol=1e-3)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_compression_changes_no_pixel(tmp_path: Path, syntax: str) -> None:
    pixels = np.random.default_rng(0).integers(-2000, 2000, (40, 36)).astype(np.int16)
    plain = grey(save(tmp_path / "a.dcm", pixels))
    assert np.array_equal(grey(save_compressed(tmp_path / "b.dcm", pixels, syntax)), plain)


@pytest.mark.parametrize(("bits", "signed"), [(12, False), (12, True), (16, False), (16, True)])
def test_lossless_jpeg_changes_no_pixel(tmp_path: Path, bits: int, signed: bool) -> None:
    half = 2 ** (bits - 1)
    pixels = (
        np.random.default_rng(0)
        .integers(-half if signed else 0, half, (40, 36))
        .astype(np.int16 if signed else np.uint16)
    )
    plain = grey(save(tmp_path / "a.dcm", pixels, bits), window="full")
    codes = pixels.astype(np.uint16) & (2**bits - 1)
    stream = imagecodecs.jpeg8_encode(codes, lossless=True, bitspersample=bits)
    data = dataset(pixels, bits)
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    data.save_as(tmp_path / "b.dcm")
    assert np.array_equal(grey(tmp_path / "b.dcm", window="full"), plain)


def test_colours_and_their_profile(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    image = read_image(save(tmp_path / "a.dcm", pixels), max_pixels=MAX)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    path = save(tmp_path / "a.dcm", pixels, ICCProfile=lab + bytes(len(lab) % 2))
    assert "colour profile" in reason(path)


def test_files_are_recognised_by_their_content(tmp_path: Path) -> None:
    expected = grey(save(tmp_path / "a.dcm", RAMP, 12))
    assert np.array_equal(grey((tmp_path / "a.dcm").rename(tmp_path / "IM000001")), expected)
    bare = Dataset()
    bare.update(dataset(RAMP, 12))
    for name, implicit, little in (("b", True, True), ("c", False, True), ("d", False, False)):
        if not little:
            bare.PixelData = RAMP.byteswap().tobytes()
        pydicom.dcmwrite(tmp_path / name, bare, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
        assert (tmp_path / name).read_bytes()[128:132] != b"DICM"
        assert np.array_equal(grey(tmp_path / name), expected), name


def test_what_is_not_an_image_is_named(tmp_path: Path) -> None:
    directory = dataset(RAMP, sop="1.2.840.10008.1.3.10")
    directory.save_as(tmp_path / "DICOMDIR")
    assert reason(tmp_path / "DICOMDIR") == "is a DICOMDIR, which is never followed"
    report = dataset(RAMP, sop="1.2.840.10008.5.1.4.1.1.88.11")
    report.save_as(tmp_path / "a.dcm")
    assert reason(tmp_path / "a.dcm") == "is a DICOM file without an image"
    without = dataset(RAMP)
    del without.PixelData
    without.save_as(tmp_path / "a.dcm")
    assert reason(tmp_path / "a.dcm") == "is a DICOM file without pixels"
    slide = save(tmp_path / "a.dcm", RAMP, TotalPixelMatrixColumns=1000, TotalPixelMatrixRows=1000)
    assert "slide in tiles" in reason(slide)
    video = dataset(RAMP)
    video.compress(RLELossless)
    video.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    video.save_as(tmp_path / "a.dcm")
    assert reason(tmp_path / "a.dcm").startswith("has the transfer syntax MPEG-4")


def test_sizes_are_limited_before_anything_is_decoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", RAMP, Rows=60_000, Columns=60_000)
    assert "data.max_pixels" in reason(path, max_pixels=MAX)
    assert reason(path, max_pixels=2**33) == "the file is truncated"
    assert "data.min_side" in reason(save(tmp_path / "a.dcm", RAMP), min_side=33)


def test_compressed_pixels_of_another_size_than_declared_are_refused(tmp_path: Path) -> None:
    path = save_compressed(tmp_path / "a.dcm", np.zeros((64, 64), np.uint16))
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 60_000, 60_000)
    path.write_bytes(data)
    assert reason(path) == (
        "its compressed pixels are 60000 x 60000 with 1 channels; its header says 64 x 64 with 1"
    ) or "tiles" in reason(path)


def test_a_stream_of_very_many_precincts_is_refused() -> None:
    size = struct.pack(">HIIIIIIIIH", 0, 4000, 4000, 0, 0, 4000, 4000, 0, 0, 1) + b"\x0f\1\1"
    style = b"\1\0\0\1\0" + bytes([5, 4, 4, 0, 0]) + bytes(6)
    stream = b"\xff\x4f\xff\x51" + struct.pack(">H", len(size) + 2) + size
    stream += b"\xff\x52" + struct.pack(">H", len(style) + 2) + style + b"\xff\x90\0\x0a" + bytes(8) + b"\xff\xd9"
    with pytest.raises(RefusalError, match="precincts"):
        check_frame(stream, JPEG2000Lossless, (4000, 4000), 1)


def test_truncated_streams_are_refused_even_if_warnings_are_accepted(tmp_path: Path) -> None:
    path = save_compressed(tmp_path / "a.dcm", np.random.default_rng(0).integers(0, 999, (64, 64)).astype(np.uint16),
                           JPEGLSLossless)  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[:-600])
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        read_image(path, max_pixels=MAX, accept=lambda _: None)


def test_files_that_may_name_a_patient_are_remarked(tmp_path: Path) -> None:
    def remarks(**elements: Any) -> list[str]:
        seen: list[str] = []
        check_image(save(tmp_path / "a.dcm", RAMP, **elements), max_pixels=MAX, remark=seen.append)
        return seen

    assert remarks() == []
    assert remarks(BurnedInAnnotation="YES") == [BURNED_IN]
    assert remarks(Modality="US") == [ULTRASOUND]
    assert remarks(sop="1.2.840.10008.5.1.4.1.1.7.2") == [SECONDARY_CAPTURE]


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.dcm", RAMP)
    dicom_files.pydicom.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pydicom", None)
        with pytest.raises(PlatformError, match=r'pip install "fpt-vit\[dicom\]"'):
            read_image(path, max_pixels=MAX)
    dicom_files.pydicom.cache_clear()
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    program = (
        "import sys; from pathlib import Path; from stages.images import read_image; "
        f"read_image(Path({str(tmp_path / 'a.png')!r}), max_pixels=9999); sys.exit('pydicom' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
