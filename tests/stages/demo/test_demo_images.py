from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from stages.demo.images import ORIENTATIONS, draw, make_demo_images


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png")
    }


def test_images_are_the_same_on_every_run_and_with_any_number(tmp_path: Path) -> None:
    assert make_demo_images(tmp_path / "a", images=7, size=96) == 7
    assert make_demo_images(tmp_path / "b", images=4, size=96) == 4
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert len(set(first.values())) == 7
    assert second.items() <= first.items()
    make_demo_images(tmp_path / "c", images=4, size=96, seed=1)
    assert not set(digests(tmp_path / "c").values()) & set(first.values())


def test_what_is_there_is_kept_and_what_is_missing_is_made(tmp_path: Path) -> None:
    make_demo_images(tmp_path, images=6, size=96)
    before = digests(tmp_path)
    lost = tmp_path / "grating_060" / "0001.png"
    lost.unlink()
    calls: list[tuple[int, int]] = []
    assert make_demo_images(tmp_path, images=6, size=96, progress=lambda *call: calls.append(call)) == 1
    assert digests(tmp_path) == before
    assert calls == [(number, 6) for number in range(1, 7)]


def test_classes_take_turns_and_nothing_else_lies_in_the_folders(tmp_path: Path) -> None:
    make_demo_images(tmp_path, images=9, size=518)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grating_000", "grating_060", "grating_120"]
    assert [len(list(folder.iterdir())) for folder in sorted(tmp_path.iterdir())] == [3, 3, 3]
    with Image.open(tmp_path / "grating_000" / "0000.png") as image:
        assert (image.mode, image.size) == ("L", (518, 518))


def band_power(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the spectral power for each of `ORIENTATIONS`, for periods of `low` to `high` pixels."""
    size = len(pixels)
    power = np.abs(np.fft.fft2(pixels - pixels.mean())) ** 2
    across, down = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))
    radius = np.hypot(across, down)
    angle = np.degrees(np.arctan2(down, across)) % 180
    band = (radius > 1 / high) & (radius < 1 / low)
    away = [np.abs((angle - orientation + 90) % 180 - 90) for orientation in ORIENTATIONS]
    return np.array([power[band & (distance < 15)].mean() for distance in away])


def test_the_class_is_there_at_518_pixels_and_gone_at_144() -> None:
    large_hits, small_hits, count = 0, 0, 30
    for number in range(count):
        kind = number % 3
        pixels = draw(ORIENTATIONS[kind], 518, np.random.default_rng(number))
        large_hits += int(np.argmax(band_power(pixels.astype(float), 3.4, 4.5)) == kind)
        small = Image.fromarray(pixels).resize((144, 144), Image.Resampling.BICUBIC)
        small_hits += int(np.argmax(band_power(np.asarray(small, dtype=float), 2.0, 72.0)) == kind)
    assert large_hits == count
    assert small_hits < count * 0.6
