"""16-bit and float PNG and TIFF files with a window; without one their pixels are what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import reason
from PIL import Image, ImageCms

from schemas.rendering import Rendering
from stages.grey_windows import linear, percentile_range
from stages.image_remarks import DARK
from stages.images import check_image, read_image, rgb_image

MAX = 10_000_000
RNG = np.random.default_rng(0)
TWELVE_BITS = RNG.integers(0, 4096, (50, 60)).astype(np.uint16)


def read(path: Path, window: Any = "stored") -> Image.Image:
    return read_image(path, max_pixels=MAX, rendering=Rendering(window=window))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_windows_of_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(TWELVE_BITS).save(path)
    stored = read(path)
    assert stored.mode == "RGB" and np.asarray(stored).max() == 16  # nearly black, as before there were windows
    for window, low, high in (
        ("full", 0, 65535),
        ("percentile", *np.percentile(TWELVE_BITS, (0.5, 99.5))),
        ((2000.0, 1000.0), 1500, 2500),
    ):
        image = read(path, window)
        assert image.mode == "F"
        assert np.allclose(
            np.asarray(image), ((TWELVE_BITS.astype(float) - low) / (high - low)).clip(0, 1) * 255, atol=1e-3
        )


def test_a_stated_window_is_the_same_for_every_file_and_percentiles_are_not(tmp_path: Path) -> None:
    for name, factor in (("a", 1), ("b", 4)):
        Image.fromarray(TWELVE_BITS * np.uint16(factor)).save(tmp_path / f"{name}.png")
    a, b = (np.asarray(read(tmp_path / f"{name}.png", "percentile")) for name in "ab")
    assert np.allclose(a, b, atol=1e-3)
    a, b = (np.asarray(read(tmp_path / f"{name}.png", (8000.0, 16000.0))) for name in "ab")
    assert np.allclose((4 * a).clip(0, 255), b, atol=1e-3)


def test_float_and_signed_pixels_need_a_window(tmp_path: Path) -> None:
    values = RNG.normal(0, 300, (30, 40)).astype(np.float32)
    values[0, 0] = np.nan
    for name, pixels in (("float", values), ("signed", np.nan_to_num(values).astype(np.int32))):
        path = tmp_path / f"{name}.tif"
        Image.fromarray(pixels).save(path)
        assert "features.window" in reason(path)
        shown = np.asarray(read(path, (0.0, 600.0)))
        assert np.allclose(shown, np.nan_to_num(((pixels + 300.0) / 600).clip(0, 1) * 255), atol=1e-3)
        assert np.asarray(read(path, "percentile")).max() == 255


def test_inverted_tiff_and_profile(tmp_path: Path) -> None:
    Image.fromarray(TWELVE_BITS).save(tmp_path / "a.tif")
    Image.fromarray(TWELVE_BITS).save(tmp_path / "b.tif", tiffinfo={262: 0})
    plain, inverted = (np.asarray(read(tmp_path / f"{name}.tif", "percentile")) for name in "ab")
    assert np.allclose(plain + inverted, 255, atol=1e-3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(TWELVE_BITS).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(read(tmp_path / "a.png", "percentile")), plain)


def test_eight_bits_do_not_depend_on_the_window(tmp_path: Path) -> None:
    Image.fromarray(TWELVE_BITS.astype(np.uint8)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").tobytes() == read(tmp_path / "a.png", (10.0, 5.0)).tobytes()


def test_images_in_memory_are_windowed_as_files(tmp_path: Path) -> None:
    Image.fromarray(TWELVE_BITS).save(tmp_path / "a.png")
    for window in ("stored", "percentile", (100.0, 100.0)):
        memory = rgb_image(Image.fromarray(TWELVE_BITS), "image", max_pixels=MAX, rendering=Rendering(window=window))
        assert memory.tobytes() == read(tmp_path / "a.png", window).tobytes()


def test_bands_have_the_window_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.sort(TWELVE_BITS, axis=0)).save(tmp_path / "a.png")
    whole = read(tmp_path / "a.png", "percentile").tobytes()
    monkeypatch.setattr("stages.image_conversion._BAND_PIXELS", 60 * 7)
    assert read(tmp_path / "a.png", "percentile").tobytes() == whole


@pytest.mark.parametrize(("factor", "window", "remarks"), [(1, "stored", [DARK]), (1, "full", []), (4, "stored", [])])
def test_a_file_that_comes_out_nearly_black_is_remarked(
    tmp_path: Path, factor: int, window: Any, remarks: list[str]
) -> None:
    Image.fromarray(TWELVE_BITS * np.uint16(factor)).save(tmp_path / "a.png")
    seen: list[str] = []
    check_image(tmp_path / "a.png", max_pixels=MAX, rendering=Rendering(window=window), remark=seen.append)
    assert seen == remarks


def test_ranges_of_unusual_images() -> None:
    constant = np.full((4, 4), 7)
    assert percentile_range(constant) == (7, 7)
    assert (linear(constant, 7, 7) == 0).all()
    assert percentile_range(constant, np.ones((4, 4), bool)) == (0, 0)
    sparse = np.zeros((100, 100))
    sparse[0, 0] = 5
    assert percentile_range(sparse) == (0, 5)
