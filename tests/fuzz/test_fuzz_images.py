"""Mutants of small image files: each is refused by an ImageError, or decodes, within bounds of time and memory.

FPT_FUZZ_SEED selects other cases, FPT_FUZZ_CASES their number.
"""

from __future__ import annotations

import io
import os
import random
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from schemas.errors import ImageError
from stages.images import check_image, read_image

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "600"))
MAX_PIXELS = 4_000_000
SECONDS = 2.0


def originals() -> dict[str, bytes]:
    """Encode a small file for each format, pixel type, layout and kind of metadata."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:64]
    smooth = np.stack([x * 4, y * 5, (x + y) * 2], axis=-1)
    colour = Image.fromarray((smooth + rng.integers(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=np.uint16))
    clear = colour.copy()
    clear.putalpha(colour.getchannel("G"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description of the image"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    notes: dict[str, object] = {"exif": exif, "icc_profile": icc}
    variants: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "png": (colour, "PNG", notes),
        "png 16": (grey16, "PNG", {}),
        "png palette": (colour.quantize(16), "PNG", {"transparency": 3}),
        "png alpha": (clear, "PNG", {}),
        "png 1": (colour.convert("1"), "PNG", {}),
        "jpeg": (colour, "JPEG", notes),
        "jpeg grey": (colour.convert("L"), "JPEG", {}),
        "jpeg cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "jpeg progressive": (colour, "JPEG", {"progressive": True, "subsampling": 0}),
        "jpeg restarts": (colour, "JPEG", {"restart_marker_blocks": 2, "optimize": True}),
        "tiff": (colour, "TIFF", notes),
        "tiff 16": (grey16, "TIFF", {}),
        "tiff big": (colour, "TIFF", {"big_tiff": True}),
        "tiff tiles": (colour, "TIFF", {"compression": "tiff_lzw", "tiffinfo": {322: 32, 323: 32}}),
        "tiff deflate": (colour, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff jpeg": (colour, "TIFF", {"compression": "jpeg"}),
        "tiff cmyk": (colour.convert("CMYK"), "TIFF", {"compression": "packbits"}),
        "bmp": (colour, "BMP", {}),
        "bmp palette": (colour.quantize(16), "BMP", {}),
        "webp": (colour, "WEBP", notes),
        "webp lossless": (clear, "WEBP", {"lossless": True}),
    }
    files = {}
    for name, (image, kind, options) in variants.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    at, value = rng.randrange(len(data)), rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)])
    data[at : at + len(value)] = value


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 60)]


def repeat(data: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(len(data)), rng.randrange(1, 400)
    data[at:at] = data[at : at + length] * rng.randrange(1, 5)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, flip, overwrite, remove, repeat, cut)


def outcome(path: Path, data: bytes) -> Image.Image | str:
    """Return the image, or the reason for its rejection; prepare and extraction must agree."""
    path.write_bytes(data)
    start = time.process_time()
    found: Image.Image | str
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_image(path, max_pixels=MAX_PIXELS)
        except ImageError as error:
            found = error.reason
        try:
            check_image(path, max_pixels=MAX_PIXELS)
        except ImageError as error:
            assert found == error.reason
        else:
            assert not isinstance(found, str)
    assert time.process_time() - start < 2 * SECONDS
    return found


def test_mutants_are_refused_or_decode(tmp_path: Path) -> None:
    files, rng = originals(), random.Random(SEED)
    for name, data in files.items():
        assert isinstance(outcome(tmp_path / "a", data), Image.Image), name
    refused = 0
    for _ in range(CASES):
        data = bytearray(rng.choice(list(files.values())))
        for _ in range(rng.choice([1, 1, 2, 5])):
            if data:
                rng.choice(MUTATIONS)(data, rng)
        found = outcome(tmp_path / "a", bytes(data))
        if isinstance(found, str):
            refused += 1
            assert found and len(found) < 200
        else:
            assert found.mode == "RGB" and found.width * found.height <= MAX_PIXELS
    assert 0.2 * CASES < refused < CASES


def test_no_jpeg_of_which_libjpeg_warns_is_accepted(tmp_path: Path) -> None:
    """Compare with complete decoding in colour, since the check only decodes one channel at an eighth of the size."""
    files, rng = originals(), random.Random(SEED)
    jpegs = [data for name, data in files.items() if name.startswith("jpeg") and "cmyk" not in name]
    warned = 0
    for _ in range(CASES):
        data = bytearray(rng.choice(jpegs))
        header = data.index(b"\xff\xda") + 16
        body = data[header:]
        rng.choice(MUTATIONS)(body, rng)
        data = data[:header] + body
        found = outcome(tmp_path / "a.jpg", bytes(data))
        try:
            simplejpeg.decode_jpeg(bytes(data))
        except ValueError as error:
            warned += 1
            assert isinstance(found, str), error
    assert warned > 0.2 * CASES


@pytest.mark.parametrize("name", [name for name in originals() if name.startswith("png")])
def test_every_flip_that_a_checksum_covers_is_refused(tmp_path: Path, name: str) -> None:
    data, rng = originals()[name], random.Random(SEED)
    end = data.index(b"IEND") + 8
    # The signature and the lengths of the chunks, which no checksum covers.
    places = range(8, end)
    for at in rng.sample(places, min(len(places), max(20, CASES // 6))):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        assert isinstance(outcome(tmp_path / "a.png", bytes(damaged)), str), at


def test_sizes_in_headers_take_no_memory(tmp_path: Path) -> None:
    """A header of 65,535 x 65,535 pixels is refused before anything is decoded."""
    data = bytearray(originals()["jpeg grey"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    assert "data.max_pixels" in str(outcome(tmp_path / "a.jpg", bytes(data)))
