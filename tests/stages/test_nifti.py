"""Axial slices of NIfTI volumes of any orientation."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from image_files import reason

from schemas.errors import ImageError, PlatformError
from schemas.rendering import Rendering
from stages.images import read_image

MAX = 10_000_000
VOLUME = np.random.default_rng(0).integers(-1000, 1000, (30, 24, 20)).astype(np.int16)
"""Axes to the right, to the front, and up."""


def save(path: Path, volume: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def grey(path: Path, **rendering: Any) -> np.ndarray:
    image = read_image(path, max_pixels=MAX, rendering=Rendering(**{"window": (0.0, 2000.0), **rendering}))
    assert image.mode == "F"
    return np.asarray(image)


def shown(plane: np.ndarray, low: float = -1000, high: float = 1000) -> np.ndarray:
    """Anterior up, the right side of the patient on the left."""
    return ((plane[::-1, ::-1].T.astype(float) - low) / (high - low)).clip(0, 1) * 255


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_slices_are_chosen(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", VOLUME)
    for frame, number in (("first", 0), ("middle", 10), (19, 19)):
        assert np.allclose(grey(path, frame=frame), shown(VOLUME[..., number]), atol=1e-3)
    with pytest.raises(ImageError, match=r"has 20 slices, numbered from 0, so not the one that features\.frame names"):
        grey(path, frame=20)
    assert grey(path.rename(tmp_path / "no-suffix")).shape == (24, 30)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_and_direction_of_axes_shows_the_same(tmp_path: Path, order: tuple[int, ...]) -> None:
    for flips in itertools.product((1, -1), repeat=3):
        stored = VOLUME.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (direction, flip) in enumerate(zip(order, flips, strict=True)):
            affine[direction, axis] = flip
        path = save(tmp_path / "a.nii", stored, affine)
        assert np.allclose(grey(path, frame=3), shown(VOLUME[..., 3]), atol=1e-3), (order, flips)


def test_windows(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", VOLUME, cal_min=-200, cal_max=300)
    middle = VOLUME[..., 10]
    assert np.allclose(grey(path, window="stored"), shown(middle, -200, 300), atol=1e-3)
    assert np.allclose(grey(path, window="full"), shown(middle, -32768, 32767), atol=1e-3)
    low, high = np.percentile(middle, (0.5, 99.5))
    assert np.allclose(grey(path, window="percentile"), shown(middle, low, high), atol=1e-3)
    assert np.allclose(grey(save(tmp_path / "b.nii", VOLUME), window="stored"), shown(middle, low, high), atol=1e-3)


def test_scaling_several_volumes_flat_images_and_missing_values(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.stack([VOLUME, VOLUME * 0], axis=-1), np.eye(4))
    image.header.set_slope_inter(2, -100)
    nibabel.save(image, tmp_path / "a.nii")
    assert np.allclose(grey(tmp_path / "a.nii"), shown(VOLUME[..., 10] * 2.0 - 100), atol=1e-3)
    assert np.allclose(grey(save(tmp_path / "b.nii", VOLUME[..., 0])), shown(VOLUME[..., 0]), atol=1e-3)
    values = VOLUME.astype(np.float32)
    values[0, 0] = np.nan
    assert (grey(save(tmp_path / "c.nii", values))[-1, -1]) == 0
    assert "no known range" in fails(tmp_path / "c.nii", window="full")


def fails(path: Path, **rendering: Any) -> str:
    with pytest.raises(ImageError) as error:
        grey(path, **rendering)
    return error.value.reason


def test_what_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", VOLUME)
    data = path.read_bytes()
    for length in (100, 400, 350 + VOLUME[..., :9].nbytes):
        path.write_bytes(data[:length])
        assert fails(path) in ("the file is truncated", "the file is damaged", "is not a PNG, JPEG, TIFF, BMP, WebP, "
                               "DICOM or NIfTI image")  # fmt: skip
    packed = save(tmp_path / "b.nii.gz", VOLUME)
    packed.write_bytes(packed.read_bytes()[:9000])
    assert fails(packed) == "the file is truncated"
    assert "complex64" in fails(save(tmp_path / "c.nii", VOLUME.astype(np.complex64)))
    wide = bytearray(data)
    wide[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(wide)
    assert fails(path) == "has more than 4 GiB per volume"
    wide[46:48] = np.array([1], "<i2").tobytes()
    path.write_bytes(wide)
    assert "data.max_pixels" in fails(path)
    pair = nibabel.Nifti1Pair(VOLUME, np.eye(4))
    nibabel.save(pair, tmp_path / "d.img")
    assert reason(tmp_path / "d.hdr") == "is a NIfTI pair file, which is not read yet"


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii", VOLUME)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(PlatformError, match=r'pip install "fpt-vit\[nifti\]"'):
        grey(path)
