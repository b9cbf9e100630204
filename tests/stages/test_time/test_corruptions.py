"""Corruptions: stronger is farther, the same for an image and a seed, at any resolution."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from schemas.shift import STRENGTHS
from stages.test_time.corruptions import SHIFTS, VALUES, corrupted


def picture(size: int = 96) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    waves = 128 + 60 * np.sin(40 * x) * np.cos(30 * y)
    return Image.fromarray(np.stack([waves, waves * 0.8, 255 - waves], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("shift", SHIFTS)
def test_stronger_is_farther(shift: str) -> None:
    image = picture()
    original = np.asarray(image, np.float64)
    kind = next(one for one in SHIFTS if one == shift)
    assert len(VALUES[kind]) == len(STRENGTHS)
    distances = []
    for strength in STRENGTHS:
        found = corrupted(image, kind, strength, 96, "ab" * 32, 0)
        assert (found.mode, found.size) == ("RGB", image.size)
        distances.append(float(np.abs(np.asarray(found, np.float64) - original).mean()))
    assert distances[0] > 0 and distances == sorted(distances)
    assert distances[-1] > 1.5 * distances[0]


def test_noise_is_that_of_the_image_and_the_seed() -> None:
    def noisy(image_id: str, seed: int, strength: int = 3) -> bytes:
        return corrupted(picture(), "noise", strength, 96, image_id, seed).tobytes()

    first = noisy("ab" * 32, 0)
    assert first == noisy("ab" * 32, 0)
    assert len({first, noisy("cd" * 32, 0), noisy("ab" * 32, 1), noisy("ab" * 32, 0, 2)}) == 4


def test_images_are_reduced_first_and_grey_ones_become_rgb() -> None:
    wide = picture(400).resize((800, 400))
    assert corrupted(wide, "jpeg", 1, 96, "ab" * 32, 0).size == (192, 96)
    grey = Image.fromarray(np.full((50, 60), 99.6, np.float32))
    assert np.asarray(corrupted(grey, "brightness", 1, 96, "ab" * 32, 0)).max() == round(100 + 25.5)
