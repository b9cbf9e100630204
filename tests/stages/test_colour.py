"""Embedded colour profiles against the formulas of their colour spaces."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from schemas.errors import ImageError
from stages.images import read_image

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""Adobe RGB (1998): XYZ of its red, green and blue, adapted to D50."""
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
D50 = (0.9642, 1.0, 0.8249)


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2.4 with any tags."""
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        padded = body + bytes(-len(body) % 4)
        table += struct.pack(">4sII", name, offset + len(data), len(body))
        data += padded
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", 0, b"test", 0x02400000, kind, space, connection)
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", *(round(value * 65536) for value in D50))
    body = header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(body)) + body[4:]


def xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def common() -> dict[bytes, bytes]:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    return {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(D50)}


def rgb_profile(primaries: tuple[tuple[float, float, float], ...], power: float) -> bytes:
    tags = common()
    for letter, primary in zip(b"rgb", primaries, strict=True):
        tags[bytes([letter]) + b"XYZ"] = xyz(primary)
        tags[bytes([letter]) + b"TRC"] = gamma(power)
    return profile(b"RGB ", tags)


def grey_profile(power: float) -> bytes:
    return profile(b"GRAY", {**common(), b"kTRC": gamma(power)})


def cmyk_profile() -> bytes:
    """Inks that all darken alike: L* = 100 * (1 - c) (1 - m) (1 - y) (1 - k), no hue at all."""
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    nodes = b"".join(bytes([255 if node == 0 else 0, 128, 128]) for node in range(16))
    return profile(b"CMYK", {**common(), b"A2B0": table + ramp * 4 + nodes + ramp * 3}, b"Lab ")


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.clip(linear, 0, 1) ** (1 / 2.4) - 0.055)


def colours(size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    return np.asarray(read_image(path, max_pixels=10**6)).astype(int)


def saved(path: Path, image: Image.Image, icc: bytes) -> Path:
    image.save(path, icc_profile=icc, **({"lossless": True, "exact": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_adobe_rgb_becomes_srgb_by_the_formula(tmp_path: Path, suffix: str) -> None:
    pixels = colours()
    found = read(saved(tmp_path / f"a.{suffix}", Image.fromarray(pixels), rgb_profile(ADOBE, 563 / 256)))
    linear = (pixels / 255) ** (563 / 256) @ np.array(ADOBE) @ np.linalg.inv(np.array(SRGB))
    expected = np.round(255 * srgb_curve(np.clip(linear, 0, 1)))
    assert np.abs(found - expected).max() <= 3
    assert np.abs(found - pixels).max() > 30


def test_a_jpeg_is_converted_too(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (180, 60, 60))
    with_profile = read(saved(tmp_path / "a.jpg", image, rgb_profile(ADOBE, 2.2)))[5, 5]
    image.save(tmp_path / "b.jpg")
    assert with_profile[0] > read(tmp_path / "b.jpg")[5, 5][0] + 10, "a wider space: the same numbers mean more colour"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_srgb_pixels_are_kept_bit_for_bit(tmp_path: Path, mode: str) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(colours()).convert(mode)
    found = read(saved(tmp_path / "a.png", image, icc))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_another_text_of_the_srgb_curve_counts_as_srgb_and_gamma_does_not(tmp_path: Path) -> None:
    levels = np.linspace(0, 1, 256)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 256) + np.round(linear * 65535).astype(">u2").tobytes()
    tags = common()
    for letter, primary in zip("rgb", SRGB, strict=True):
        tags |= {f"{letter}XYZ".encode(): xyz(primary), f"{letter}TRC".encode(): curve}
    pixels = colours()
    assert np.array_equal(read(saved(tmp_path / "a.png", Image.fromarray(pixels), profile(b"RGB ", tags))), pixels)
    found = read(saved(tmp_path / "b.png", Image.fromarray(pixels), rgb_profile(SRGB, 2.2)))
    assert 2 < np.abs(found - pixels).max() < 20


def test_grey_with_a_profile_of_its_own(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(2).reshape(16, 32))
    found = read(saved(tmp_path / "a.png", ramp, grey_profile(1.0)))
    expected = np.round(255 * srgb_curve(np.asarray(ramp) / 255))
    assert np.abs(found[..., 0] - expected).max() <= 3
    assert np.array_equal(found[..., 0], found[..., 2])


def test_grey_with_a_profile_for_colours(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(2).reshape(16, 32))
    found = read(saved(tmp_path / "a.png", ramp, rgb_profile(SRGB, 1.0)))
    assert np.abs(found[..., 0] - np.round(255 * srgb_curve(np.asarray(ramp) / 255))).max() <= 3


def test_16_bit_grey_with_a_profile(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 512).reshape(16, 32).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={34675: grey_profile(1.0)})
    found = read(tmp_path / "a.tif")[..., 0]
    assert np.abs(found - np.round(255 * srgb_curve(np.round(values / 257) / 255))).max() <= 3


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_goes_through_its_profile(tmp_path: Path, suffix: str) -> None:
    cyan = Image.new("CMYK", (32, 32), (128, 0, 0, 0))
    cyan.save(tmp_path / f"plain.{suffix}")
    red, green, blue = read(tmp_path / f"plain.{suffix}")[5, 5]
    assert blue - red > 100
    red, green, blue = read(saved(tmp_path / f"a.{suffix}", cyan, cmyk_profile()))[5, 5]
    assert max(red, green, blue) - min(red, green, blue) <= 3, "this profile has no hue"
    assert abs(green - 119) <= 4, "L* = 50"


def test_transparent_pixels_are_laid_over_black_after_the_conversion(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (128, 128, 128, 255))
    image.paste((128, 128, 128, 0), (0, 0, 16, 32))
    found = read(saved(tmp_path / "a.png", image, rgb_profile(SRGB, 1.0)))
    assert found[5, 5].tolist() == [0, 0, 0]
    assert abs(found[5, 25][0] - 188) <= 1


def test_a_palette_with_a_profile(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 128, 128, 128])
    found = read(saved(tmp_path / "a.png", image, rgb_profile(SRGB, 1.0)))
    assert abs(found[5, 5][1] - 188) <= 1


@pytest.mark.parametrize(
    ("icc", "reason"),
    [
        (b"no profile at all", "damaged"),
        (rgb_profile(ADOBE, 2.2)[:200], "damaged"),
        (profile(b"RGB ", common()), "damaged"),
        (cmyk_profile(), "is for CMYK pixels"),
        (grey_profile(2.2), "is for GRAY pixels"),
    ],
)
def test_a_profile_that_cannot_be_meant_is_refused(tmp_path: Path, icc: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(saved(tmp_path / "a.png", Image.fromarray(colours()), icc))
    assert reason in caught.value.reason
    assert "colour profile" in caught.value.reason
