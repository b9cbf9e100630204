"""Pixels of readable image files, and refusal of files that are not images."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from image_files import MAX, gradient, noise, png, reason
from PIL import Image, ImageFile

from stages.images import read_image


@contextmanager
def nobody() -> Iterator[None]:
    """Tests of permissions as a user who has none: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path, max_pixels=MAX)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.array_equal(np.asarray(image), gradient())


def test_jpeg_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "really_a_jpeg.png"
    Image.fromarray(gradient()).save(path, "JPEG", quality=95)
    assert np.abs(np.asarray(read_image(path, max_pixels=MAX)).astype(int) - gradient()).mean() < 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    grey = np.asarray(read_image(path, max_pixels=MAX))
    assert np.array_equal(grey[..., 0], np.round(values / 257).astype(np.uint8))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert grey.min() == 0 and grey.max() == 255


def test_16_bit_tiff_of_the_other_byte_order(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(">u2")
    # Width, height, bits, compression none, photometric, offset of the strip, rows, bytes.
    tags = [(256, 30), (257, 20), (258, 16), (259, 1), (262, 1), (273, 8), (278, 20), (279, 1200)]
    path = tmp_path / "a.tif"
    ifd = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"MM\x00\x2a" + struct.pack(">I", 8 + 1200) + values.tobytes() + ifd + bytes(4))
    grey = np.asarray(read_image(path, max_pixels=MAX))[..., 0]
    assert np.array_equal(grey, np.round(values / 257).astype(np.uint8))


def test_16_bit_tiff_whose_zero_is_white_is_inverted(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(path, tiffinfo={262: 0})
    assert np.asarray(read_image(path, max_pixels=MAX)).max() == 0


def test_12_bit_tiff_uses_its_own_range(tmp_path: Path) -> None:
    # Two white pixels in three bytes, 32 of them in a row.
    tags = [(256, 32), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (278, 4), (279, 192)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path = tmp_path / "a.tif"
    path.write_bytes(b"II\x2a\x00" + struct.pack("<I", 8 + 192) + b"\xff" * 192 + ifd + bytes(4))
    assert np.asarray(read_image(path, max_pixels=MAX)).min() == 255


def test_16_bit_colour_keeps_the_upper_byte(tmp_path: Path) -> None:
    rows = b"".join(b"\x00" + struct.pack(">HHH", 0xABCD, 0x1234, 0xFFFF) * 20 for _ in range(20))
    path = tmp_path / "a.png"
    path.write_bytes(png(20, 20, 16, 2, zlib.compress(rows)))
    assert read_image(path, max_pixels=MAX).getpixel((3, 3)) == (0xAB, 0x12, 0xFF)


@pytest.mark.parametrize("values", [np.zeros((20, 20), np.float32), np.zeros((20, 20), np.int32)])
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    assert "no known range" in reason(path)


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=MAX).getpixel((5, 5)) == (10, 200, 30)


def test_palette_with_a_transparent_colour_is_laid_over_black(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    assert read_image(tmp_path / "a.png", max_pixels=MAX).getpixel((5, 5)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
        ("RGBA", (200, 100, 50, 128), (100, 50, 25)),
        ("LA", (200, 255), (200, 200, 200)),
        ("LA", (200, 0), (0, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_other_modes_of_png(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    Image.new(mode, (20, 20), colour).save(tmp_path / "a.png")  # type: ignore[arg-type]
    pixel = read_image(tmp_path / "a.png", max_pixels=MAX).getpixel((5, 5))
    assert np.abs(np.subtract(pixel, expected)).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / f"a.{suffix}")
    red, green, blue = read_image(tmp_path / f"a.{suffix}", max_pixels=MAX).getpixel((5, 5))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, options: dict[str, str], orientation: int) -> None:
    upright = gradient()
    # How a camera that was held so stores the upright scene.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    image = read_image(path, max_pixels=MAX)
    assert np.array_equal(np.asarray(image), upright)
    assert not image.getexif()


def test_exif_rotated_jpeg_and_its_damaged_note(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient(40, 30)).save(path, exif=exif)
    assert read_image(path, max_pixels=MAX).size == (30, 40)
    path.write_bytes(path.read_bytes().replace(b"Exif\x00\x00MM", b"Exif\x00\x00XX"))
    assert read_image(path, max_pixels=MAX).size == (40, 30)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    for suffix, options in {"png": {}, "webp": {"lossless": True}}.items():
        path = tmp_path / f"a.{suffix}"
        red.save(path, save_all=True, append_images=[blue], **options)
        assert read_image(path, max_pixels=MAX).getpixel((3, 3)) == (255, 0, 0), suffix


@pytest.mark.parametrize(
    ("kinds", "refused"), [((0,), True), ((2,), True), ((1,), False), ((4, 1), False), ((1, 0), True)]
)
def test_a_tiff_of_several_pages_is_refused(tmp_path: Path, kinds: tuple[int, ...], refused: bool) -> None:
    red = Image.new("RGB", (20, 20), "red")
    pages = []
    for kind in kinds:
        page = Image.new("RGB", (10, 10), "blue")
        page.encoderinfo = {"tiffinfo": {254: kind}}
        pages.append(page)
    path = tmp_path / "a.tif"
    red.save(path, save_all=True, append_images=pages)
    if refused:
        assert reason(path) == "has several pages; save each as a file of its own"
    else:
        assert read_image(path, max_pixels=MAX).getpixel((3, 3)) == (255, 0, 0)
        assert read_image(path, max_pixels=MAX).size == (20, 20)


def test_16_bit_colour_tiff_keeps_the_upper_byte(tmp_path: Path) -> None:
    data = struct.pack("<HHH", 0xABCD, 0x1234, 0xFFFF) * 600
    # Width, height, three samples of 16 bits, no compression, RGB, strip.
    shorts = 8 + len(data)
    tags = [(256, 4, 1, 30), (257, 4, 1, 20), (258, 3, 3, shorts), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 3), (278, 4, 1, 20), (279, 4, 1, len(data))]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    path = tmp_path / "a.tif"
    path.write_bytes(b"II\x2a\x00" + struct.pack("<I", shorts + 6) + data + struct.pack("<3H", 16, 16, 16) + ifd)
    assert read_image(path, max_pixels=MAX).getpixel((3, 3)) == (0xAB, 0x12, 0xFF)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    assert reason(tmp_path / "text.png") == "is not a PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI image"
    assert reason(tmp_path / "empty.png") == "the file is empty"
    assert reason(tmp_path / "missing.png") == "no such file"
    assert reason(tmp_path) == "is a folder"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "is not a regular file"


def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 20)).save(path)
    path.chmod(0)
    with nobody():
        assert reason(path) == "permission denied"


def test_threads_read_the_same_images(tmp_path: Path) -> None:
    for index in range(16):
        Image.new("RGB", (50, 50), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def read(index: int) -> int:
        if index == 16:
            reason(tmp_path / "bad.png")
            return 16
        return read_image(tmp_path / f"{index}.png", max_pixels=MAX).getpixel((0, 0))[0]

    order = list(range(17)) * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, order)) == order


def test_the_image_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.fromarray(gradient()).save(path)
    image = read_image(path, max_pixels=MAX)
    path.write_bytes(b"")
    assert not isinstance(image, ImageFile.ImageFile)
    assert np.array_equal(np.asarray(image), gradient())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("GIF", "a GIF"),
        ("HEIC", "a HEIC"),
        ("NIfTI pair", "a NIfTI pair"),
        ("PDF", "a PDF"),
        ("SVG", "an SVG"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    heads = {
        "GIF": b"GIF89a",
        "HEIC": b"\0\0\0\x18ftypheic",
        "NIfTI pair": bytes(344) + b"ni1\0",
        "PDF": b"%PDF-1.4",
        "SVG": b"<svg>",
    }
    (tmp_path / "a.png").write_bytes(heads[kind])
    assert reason(tmp_path / "a.png") == f"is {name} file, which is not read yet"


def test_pixels_converted_band_by_band_are_those_converted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colour = noise(60)
    grey16 = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (60, 60), dtype=np.uint16))
    palette = colour.quantize(16)
    made = {mode: colour.convert(mode) for mode in ("RGB", "L", "1", "RGBA", "LA")}
    made["RGBA"].putalpha(colour.getchannel("R"))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in {**made, "16": grey16, "P": palette}.items():
        path = tmp_path / f"{name}.png"
        image.save(path, exif=exif, **({"transparency": 3} if name == "P" else {}))
        whole = read_image(path, max_pixels=MAX)
        with monkeypatch.context() as small:
            small.setattr("stages.image_conversion._BAND_PIXELS", 60 * 7)
            assert read_image(path, max_pixels=MAX).tobytes() == whole.tobytes(), name
