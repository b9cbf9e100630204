"""Damaged image files are refused with a reason."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from image_files import MAX, accepted, chunk, encoded, gradient, noise, reason
from PIL import Image

from schemas.errors import ImageError
from stages.images import read_image


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


def test_a_truncated_jpeg_is_reported_as_truncated(tmp_path: Path) -> None:
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
