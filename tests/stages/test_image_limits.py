"""Image files that need too much memory or time are refused, and decoding stays within the memory budget."""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from image_files import MAX, chunk, encoded, gradient, png, reason
from PIL import Image

from schemas.errors import ImageError
from stages.image_memory import MemoryBudget
from stages.images import read_image


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
