"""Near-duplicates: scaled, recompressed and brightened copies are found, other pictures of the same kind are not."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from pictures import brightened, picture, recompressed
from PIL import Image

from stages.prepare.near_duplicates import SIDE, find_near_duplicates, similar_rows, thumbnail


def found(images: dict[str, Image.Image]) -> set[tuple[str, str]]:
    ids = {name: hashlib.sha256(image.tobytes()).hexdigest() for name, image in images.items()}
    near = find_near_duplicates(ids, {name: thumbnail(image) for name, image in images.items()})
    assert set(near.key_of) == {name for pair in near.pairs for name in (pair.one, pair.other)}
    return {(pair.one, pair.other) for pair in near.pairs}


@pytest.mark.parametrize("number", [6, 30, 150])
def test_copies_are_found_and_other_pictures_are_not(number: int) -> None:
    images = {f"{at:03}": picture(at) for at in range(number)}
    assert found(images) == set()
    images["000 small"] = recompressed(images["000"])
    images["001 bright"] = brightened(images["001"])
    images["002 large"] = images["002"].resize((300, 300), Image.Resampling.BICUBIC)
    assert found(images) == {("000", "000 small"), ("001", "001 bright"), ("002", "002 large")}


def test_frames_of_one_video_are_found_although_they_leave_no_remainder() -> None:
    rng, still = np.random.default_rng(0), np.asarray(picture(0)).astype(float)
    images = {
        f"{at:02}": Image.fromarray(np.clip(still + rng.normal(0, 4, still.shape), 0, 255).astype(np.uint8))
        for at in range(40)
    }
    assert len(found(images)) == 40 * 39 // 2


def test_blank_images_are_like_no_other() -> None:
    blank = {f"blank {grey}": Image.new("L", (64, 64), grey) for grey in (0, 1, 90, 255)}
    assert found({**blank, **{str(at): picture(at) for at in range(30)}}) == set()


def test_a_set_of_near_duplicates_has_one_key_for_all_copies() -> None:
    images = {f"{at:02}": picture(at) for at in range(30)}
    images |= {"00 a": recompressed(images["00"]), "00 b": brightened(images["00"])}
    ids = {name: hashlib.sha256(name.encode()).hexdigest() for name in images}
    images["00 c"], ids["00 c"] = images["00"], ids["00"]
    near = find_near_duplicates(ids, {name: thumbnail(image) for name, image in images.items()})
    members = ("00", "00 a", "00 b", "00 c")
    assert near.key_of == dict.fromkeys(members, min(ids[name] for name in members))


def test_the_screen_excludes_no_pair() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(2500, SIDE * SIDE)).astype(np.float32) * np.geomspace(1, 0.02, SIDE * SIDE)
    rows[1200:1300] = rows[:100] + rng.normal(size=(100, SIDE * SIDE)) * 0.05
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    pairs, products = similar_rows(rows, 0.5)
    full = np.triu(rows @ rows.T, 1)
    assert len(pairs) > 100
    assert {tuple(pair) for pair in pairs.tolist()} == {tuple(pair) for pair in np.argwhere(full >= 0.5).tolist()}
    np.testing.assert_allclose(products, full[pairs[:, 0], pairs[:, 1]], atol=1e-5)
