"""One image file in, one upright RGB image or one reason out."""

from __future__ import annotations

import functools
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from schemas.errors import ImageError
from stages.image_memory import MemoryBudget
from stages.images import read_image

MAX = 250_000_000


def gradient(width: int = 40, height: int = 30) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1).astype(np.uint8)


def noise(size: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG with any header, whatever its data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def reason(path: Path, *, max_pixels: int = MAX, min_side: int = 1) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, max_pixels=max_pixels, min_side=min_side)
    assert caught.value.path == str(path)
    return caught.value.reason


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


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("png", {}),
        ("bmp", {}),
        ("webp", {}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_noticed(tmp_path: Path, suffix: str, options: dict[str, object], share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise().save(path, **options)
    read_image(path, max_pixels=MAX)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated" in reason(path) or "damaged" in reason(path)


def test_a_truncated_jpeg_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise().save(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert reason(path) == "the file is truncated"


def test_every_cut_of_a_small_file_gives_an_image_error_or_the_image(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for suffix in ("png", "jpeg", "tiff", "webp", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(gradient(16, 16)).save(buffer, suffix)
        for cut in range(0, buffer.tell(), 7):
            path.write_bytes(buffer.getvalue()[:cut])
            try:
                read_image(path, max_pixels=MAX)
            except ImageError as error:
                assert error.reason


def test_a_png_with_flipped_bits_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert "damaged" in reason(path)


def test_huge_header_is_refused_before_decoding(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(50_000, 50_000, 8, 2, zlib.compress(bytes(1000))))
    text = reason(path)
    assert "50000 x 50000" in text and "max_pixels" in text
    assert not recwarn.list


def test_the_limit_is_ours_and_not_that_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(gradient()).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(path, max_pixels=1200).size == (40, 30)
    assert "max_pixels" in reason(path, max_pixels=1199)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_more_pixels_than_pillow_would_open(tmp_path: Path) -> None:
    width = height = 13_500
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, 1, 0, zlib.compress(bytes(height * (1 + -(-width // 8))), 1)))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        # Cut short, so that the test needs no gigabyte: the point is that it gets past the header.
        cut = tmp_path / "b.png"
        cut.write_bytes(path.read_bytes()[:200])
        read_image(cut, max_pixels=MAX)


def test_small_sides(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=MAX).size == (1, 1)
    assert "min_side (16)" in reason(tmp_path / "a.png", min_side=16)
    Image.new("RGB", (100, 15)).save(tmp_path / "b.png")
    assert "100 x 15" in reason(tmp_path / "b.png", min_side=16)


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
    assert reason(tmp_path / "text.png") == "is not a PNG, JPEG, TIFF, BMP or WebP image"
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


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def encoded(suffix: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (noise(96) if image is None else image).save(buffer, suffix, **options)
    return buffer.getvalue()


def accepted(path: Path) -> list[str]:
    """Warnings about a file that is read all the same."""
    warnings: list[str] = []
    read_image(path, max_pixels=MAX, accept=warnings.append)
    return warnings


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("DICOM", "a DICOM"),
        ("GIF", "a GIF"),
        ("HEIC", "a HEIC"),
        ("NIfTI", "a NIfTI"),
        ("PDF", "a PDF"),
        ("SVG", "an SVG"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    heads = {
        "DICOM": bytes(128) + b"DICM",
        "GIF": b"GIF89a",
        "HEIC": b"\0\0\0\x18ftypheic",
        "NIfTI": bytes(344) + b"n+1\0",
        "PDF": b"%PDF-1.4",
        "SVG": b"<svg>",
    }
    (tmp_path / "a.png").write_bytes(heads[kind])
    assert reason(tmp_path / "a.png") == f"is {name} file, which is not read yet"


@pytest.mark.parametrize("place", ["IDAT", "before", "after"])
def test_a_png_chunk_that_does_not_match_its_checksum_is_refused(tmp_path: Path, place: str) -> None:
    data = encoded("PNG")
    text = chunk(b"tEXt", b"Comment\0of the scanner")
    if place == "IDAT":
        at = data.index(b"IEND") - 8
    elif place == "before":
        data, at = data[:33] + text + data[33:], 33 + 12
    else:
        data, at = data[:-12] + text + data[-12:], len(data)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    read_image(path, max_pixels=MAX)
    damaged = bytearray(data)
    damaged[at] ^= 4
    path.write_bytes(damaged)
    assert "damaged" in reason(path)
    if place != "before":
        assert "does not match its checksum" in accepted(path)[0]


def test_a_png_without_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG")[:-12])
    assert reason(path) == "the file is truncated"
    assert accepted(path) == ["the file is truncated"]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_a_jpeg_of_which_libjpeg_warns_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    data = encoded("JPEG", **options)
    path = tmp_path / "a.jpg"
    # The last blocks are missing, and the end of the image is there.
    path.write_bytes(data[:-300] + data[-2:])
    assert reason(path) == "the file is damaged (corrupt JPEG data: premature end of data segment)"
    assert len(accepted(path)) == 1
    with Image.open(path) as image:
        image.load()  # Pillow raises nothing.


def test_jpegs_of_every_type_of_pixels_pass_the_check(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for mode in ("L", "RGB", "CMYK"):
        for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "optimize": True}):
            path.write_bytes(encoded("JPEG", noise(50).convert(mode), **options))
            assert read_image(path, max_pixels=MAX).size == (50, 50)
    # What a camera appends is not the image.
    path.write_bytes(encoded("JPEG") + bytes(range(256)) * 100)
    assert read_image(path, max_pixels=MAX).size == (96, 96)


@pytest.mark.parametrize("compression", ["jpeg", "tiff_adobe_deflate"])
def test_corrupt_strips_of_a_tiff_are_refused(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(encoded("TIFF", compression=compression))
    read_image(path, max_pixels=MAX)
    with Image.open(path) as image:
        offset, length = image.tag_v2[273][0], image.tag_v2[279][0]
    data = bytearray(path.read_bytes())
    middle = offset + length // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    assert "damaged" in reason(path) or "truncated" in reason(path)


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


HOSTILE = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stages import image_memory
from stages.images import read_image, check_image
use = {"read": read_image, "check": check_image}[sys.argv[1]]
image_memory.BUDGET.capacity = 64 * 2**20
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: use(Path(sys.argv[2]), max_pixels=10**8), range(8)))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource")
def test_threads_decode_within_the_budget_of_memory(tmp_path: Path) -> None:
    # 6 million pixels in a few kilobytes: 24 MiB as they are decoded, and as many as RGB.
    Image.new("RGBA", (3000, 2000)).save(tmp_path / "a.png")
    used = {}
    for use in ("read", "check"):
        program = [sys.executable, "-c", HOSTILE, use, str(tmp_path / "a.png")]
        done = subprocess.run(program, capture_output=True, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
        used[use] = int(done.stdout)
    # The bands of a conversion come on top: 4 million pixels several times over, of one image at a time.
    assert used["read"] < (64 + 128) * 2**20
    assert used["check"] < 96 * 2**20


def test_the_budget_is_first_come_first_served_and_admits_what_is_too_large_by_itself() -> None:
    budget, order = MemoryBudget(10), []

    def take(size: int) -> None:
        with budget.hold(size):
            order.append(size)

    with ThreadPoolExecutor(3) as pool:
        with budget.hold(6):
            waiting = [pool.submit(take, 100)]
            time.sleep(0.1)
            # It would fit now, but came later.
            waiting.append(pool.submit(take, 1))
            time.sleep(0.1)
            assert not order
        for future in waiting:
            future.result(timeout=5)
    assert order == [100, 1]


def tiff_pages(count: int, last: int = 0) -> bytes:
    """A TIFF of a page and its smaller copies; `last` is where the directory after the last one lies."""
    entry = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entry += [(273, 4, 1, 0), (278, 4, 1, 16), (279, 4, 1, 256)]
    data, step = b"II*\0" + struct.pack("<I", 8), 2 + 12 * 9 + 4
    for page in range(count):
        tags = [(254, 4, 1, int(page > 0)), *entry]
        data += struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data += struct.pack("<I", 8 + step * (page + 1) if page + 1 < count else last)
    return data + bytes(300)


def exif_bomb(size: int, tags: int) -> bytes:
    """An EXIF block whose tags all have the same large value."""
    values = b"".join(struct.pack("<HHII", 40_000 + tag, 7, size - 100, 8) for tag in range(tags))
    return (b"II*\0" + struct.pack("<IH", 8, tags) + values + bytes(4)).ljust(size, b"\0")


@functools.cache
def bombs() -> dict[str, tuple[bytes, str]]:
    jpeg, progressive, png_file = encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG")
    scan = progressive.rindex(b"\xff\xda")
    app = b"\xff\xe1" + struct.pack(">H", 65_008) + b"Exif\0\0" + exif_bomb(65_000, 4000)
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000)))
    webp = encoded("WEBP")
    rle = struct.pack("<IHHI", 5_000_000, 0, 0, 1078)
    rle += struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 8, 1, 4_990_000, 0, 0, 256, 0)
    return {
        "reduced pages": (tiff_pages(10_000), "more than 64 pages"),
        "page loop": (tiff_pages(3, last=8), "loop"),
        "chunks": (png_file[:33] + chunk(b"tEXt", b"a\0b") * 101_000 + png_file[33:], "PNG chunks"),
        "PNG EXIF": (png_file[:33] + chunk(b"eXIf", exif_bomb(2_000_000, 4000)) + png_file[33:], "overlap"),
        "JPEG EXIF": (jpeg[:2] + app + jpeg[2:], "overlap"),
        "profile": (png_file[:33] + profile + png_file[33:], "damaged"),
        "scans": (progressive[:-2] + progressive[scan:-2] * 1000 + progressive[-2:], "JPEG scans"),
        "segments": (jpeg[:2] + b"\xff\xe0\0\2" * 100_000 + jpeg[2:], "JPEG segments"),
        "junk": (jpeg[:2] + b"\xff\0" * 100_000 + jpeg[2:], "64 KiB"),
        "WebP chunks": (webp + b"ABCD\0\0\0\0" * 20_000, "WebP chunks"),
        "RLE": (b"BM" + rle + bytes(1024) + b"\1\2" * 2_400_000, "run-length-encoded"),
    }


@pytest.mark.parametrize("name", bombs())
def test_files_that_would_take_far_too_long_are_refused_soon(tmp_path: Path, name: str) -> None:
    data, words = bombs()[name]
    path = tmp_path / "a"
    path.write_bytes(data)
    start = time.process_time()
    assert words in reason(path)
    assert time.process_time() - start < 2


def test_a_pyramid_and_an_image_of_many_chunks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(tiff_pages(40))
    assert read_image(path, max_pixels=MAX).size == (16, 16)
    data = encoded("PNG")
    path.write_bytes(data[:33] + chunk(b"tEXt", b"a\0b") * 500 + data[33:])
    assert read_image(path, max_pixels=MAX).size == (96, 96)
