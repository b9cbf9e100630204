"""Images of any shape to squares, for the LPM and for the side network alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from stores import SPEC
from study import Study

from schemas.features import FeatureSpec
from stages.extract.extractor import ExtractionJob, extract
from stages.extract.resize import inner_box, to_squares
from stages.store.reader import open_store

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)


def spec_of(rule: str, large: int = 64, small: int = 32) -> FeatureSpec:
    lpm = SPEC.lpm.model_copy(update={"image_size": large, "mean": MEAN})
    return SPEC.model_copy(update={"lpm": lpm, "side_image_size": small, "resize": rule})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(90, 120), (64, 64), (200, 31)])
def test_squash_scales_both_sides(size: tuple[int, int]) -> None:
    image = noise(*size)
    for found, side in zip(to_squares(image, spec_of("squash")), (64, 32), strict=True):
        assert np.array_equal(found, np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((200, 100), ((0, 16, 64, 32), (0, 8, 32, 16))),
        ((50, 200), ((24, 0, 16, 64), (12, 0, 8, 32))),
        ((80, 80), ((0, 0, 64, 64), (0, 0, 32, 32))),
        ((1000, 1), ((0, 31, 64, 1), (0, 15, 32, 1))),
    ],
)
def test_letterbox_keeps_the_aspect_centred_in_the_mean_colour(
    size: tuple[int, int], boxes: tuple[tuple[int, int, int, int], ...]
) -> None:
    image = noise(*size)
    for found, box in zip(to_squares(image, spec_of("letterbox")), boxes, strict=True):
        left, top, width, height = box
        assert inner_box(*size, len(found)) == box
        inside = found[top : top + height, left : left + width]
        assert np.array_equal(inside, np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
        outside = np.ones(found.shape[:2], bool)
        outside[top : top + height, left : left + width] = False
        assert (found[outside] == FILL).all()
        assert outside.sum() == found.shape[0] ** 2 - width * height


def test_a_circle_stays_one() -> None:
    y, x = np.mgrid[0:100, 0:200]
    disc = ((x - 100) ** 2 + (y - 50) ** 2 < 40**2)[..., None] * np.array([255, 0, 0])
    image = Image.fromarray(disc.astype(np.uint8))
    for rule, ratio in (("letterbox", 1.0), ("squash", 0.5)):
        for found in to_squares(image, spec_of(rule, 128, 96)):
            red = (found[..., 0].astype(int) - found[..., 1]) > 128
            width, height = np.ptp(np.flatnonzero(red.any(0))), np.ptp(np.flatnonzero(red.any(1)))
            assert abs(width / height - ratio) < 0.06, rule


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("rule", ["squash", "letterbox"])
def test_grey_gives_the_pixels_of_three_channels(rule: str, name: str) -> None:
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, (150, 90), dtype=np.uint8)).convert("RGB")
    spec = spec_of(rule)
    spec = spec.model_copy(update={"lpm": spec.lpm.model_copy(update={"interpolation": name})})
    touched = grey.copy()
    touched.putpixel((89, 149), (0, 0, 1))  # a colour in one place that a sample does not meet
    kind = Image.Resampling[name.upper()]
    for found, coloured in zip(to_squares(grey, spec), to_squares(touched, spec), strict=True):
        side = len(found)
        left, top, width, height = inner_box(90, 150, side) if rule == "letterbox" else (0, 0, side, side)
        area = (slice(top, top + height), slice(left, left + width))
        assert np.array_equal(found[area], np.asarray(grey.resize((width, height), kind)))
        assert np.array_equal(coloured[area], np.asarray(touched.resize((width, height), kind)))


@pytest.mark.parametrize("rule", ["squash", "letterbox"])
def test_float_grey_is_rounded_after_it_is_resized(rule: str) -> None:
    """16-bit data keep steps that 8 bits do not have: rounded first, this ramp would average to whole numbers."""
    ramp = np.broadcast_to(np.linspace(100, 100.9, 256, dtype=np.float32), (256, 256))
    grey, _ = to_squares(Image.fromarray(ramp.copy()), spec_of(rule))
    assert grey.dtype == np.uint8 and grey.shape == (64, 64, 3)
    assert sorted(np.unique(grey).tolist()) == [100, 101]
    eight = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    exact, _ = to_squares(Image.fromarray(eight.astype(np.float32)), spec_of(rule))
    rounded, _ = to_squares(Image.fromarray(eight).convert("RGB"), spec_of(rule))
    difference = np.abs(exact.astype(int) - rounded)
    assert difference.mean() < 0.3 and difference.max() <= 4  # of noise, which 8 bits round and clip after each axis


def test_the_rule_is_part_of_the_fingerprint_but_not_the_old_one() -> None:
    assert spec_of("letterbox").fingerprint != spec_of("squash").fingerprint
    old = spec_of("squash").model_dump()
    del old["resize"]
    assert FeatureSpec.model_validate(old).fingerprint == spec_of("squash").fingerprint


def test_an_extraction_follows_the_setting(study: Study) -> None:
    squashed = study.extract()
    settings = study.changed(features={"resize": "letterbox"})
    boxed = extract(ExtractionJob(settings, study.root, study.cache, study.manifest, study.features))
    assert boxed.fingerprint != squashed.fingerprint
    assert boxed.spec.resize == "letterbox"
    ids = study.manifest.ids()[:4]
    with_borders = open_store(study.cache, boxed).read(ids, ["side", "keys"])
    without = open_store(study.cache, squashed).read(ids, ["side", "keys"])
    left, top, width, height = inner_box(72, 64, 40)
    assert (left, top, width, height) == (0, 2, 40, 36)
    fill = [round(255 * value) for value in study.lpm.mean]
    assert (with_borders["side"][:, :, :top] == np.array(fill).reshape(3, 1, 1)).all()
    assert not np.array_equal(with_borders["keys"], without["keys"])
