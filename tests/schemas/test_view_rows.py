"""Row ids, and views in settings, receipts and manifests."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import SettingsError
from schemas.features import ShardReceipt
from schemas.manifest import Manifest, ManifestRow
from schemas.parse import parse_settings
from schemas.settings import FeatureSettings
from schemas.views import ViewRow, crop_view, manifest_rows, row_id, train_views, views_of
from stages.store.index import receipt_digest

IMAGE = "a" * 64


def parameters(view: str) -> list[int]:
    """Millionths of top, left, height, width."""
    return [round(float(part) * 10**6) for part in view.removeprefix("crop:").split(",")]


def receipt(**fields: Any) -> dict[str, Any]:
    return {"shard": 0, "fingerprint": "f", "rows": [IMAGE], "files": {}, "seconds": 1.0, **fields}


def test_row_ids_are_pinned() -> None:
    assert row_id(IMAGE, "identity") == IMAGE
    assert row_id(IMAGE, "hflip") == hashlib.sha256(f"{IMAGE}:hflip".encode()).hexdigest()
    assert row_id(IMAGE, "hflip").startswith("39e1002960f0e157")
    assert crop_view(IMAGE, 0, (0.8, 1.0)) == "crop:0.013506,0.010752,0.980474,0.980474"
    assert crop_view(IMAGE, 1, (0.25, 0.5)) == "crop:0.122096,0.287895,0.700162,0.700162"
    assert ViewRow(IMAGE, "crop:0.013506,0.010752,0.980474,0.980474").row_id.startswith("455ebe4c99ae7487")


def test_crops_stay_within_the_image_and_the_requested_scale() -> None:
    places: list[int] = []
    for number in range(400):
        image = hashlib.sha256(bytes([number % 7])).hexdigest()
        top, left, height, width = parameters(crop_view(image, number, (0.5, 0.9)))
        assert height == width
        assert 0.4999 <= (height / 10**6) ** 2 <= 0.9
        assert min(top, left) >= 0
        assert max(top, left) + height <= 10**6
        places.append(top)
    assert len(set(places)) > 350
    assert parameters(crop_view(IMAGE, 0, (1.0, 1.0))) == [0, 0, 10**6, 10**6]


def test_more_crops_leave_the_earlier_ones_as_they_are() -> None:
    views = [views_of(IMAGE, FeatureSettings(crops=crops)) for crops in range(4)]
    for fewer, more in pairwise(views):
        assert more[:-1] == fewer
    whole = FeatureSettings(views=("rot90", "identity"), crops=3, crop_scale=(1.0, 1.0))
    assert views_of(IMAGE, whole) == ("identity", "rot90", "crop:0.000000,0.000000,1.000000,1.000000")


def test_only_images_of_the_training_split_have_views() -> None:
    def row(number: int, split: Any, path: str = "") -> ManifestRow:
        name = path or f"{number}.png"
        return ManifestRow(id=f"{number:064x}", path=name, label="a", group=name, split=split)

    rows = (row(0, "test"), row(1, "train"), row(2, "val"), row(3, "train"), row(3, "train", "copy.png"))
    manifest = Manifest(classes=("a",), rows=rows)
    settings = FeatureSettings(views=("identity", "hflip", "rot180"))
    found = [(int(row.image, 16), row.view) for row in manifest_rows(manifest, settings)]
    assert found == [
        *((number, "identity") for number in range(4)),
        *((number, view) for number in (1, 3) for view in ("hflip", "rot180")),
    ]
    assert [row.row_id for row in manifest_rows(manifest, FeatureSettings())] == list(manifest.ids())
    assert [len(views) for views in train_views(manifest, settings)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"views": ["hflip"]}, "must list identity"),
        ({"views": ["identity", "hflip", "hflip"]}, "lists a view twice"),
        ({"views": ["identity", "rot45"]}, "rot45"),
        ({"crops": -1}, "greater than or equal to 0"),
        ({"crops": 2, "crop_scale": [0.9, 0.5]}, "lowest, highest"),
        ({"crops": 2, "crop_scale": [0.0, 0.5]}, "greater than or equal to 0.01"),
        ({"crops": 100_000}, "less than or equal to 256"),
    ],
)
def test_settings_that_make_no_sense_are_refused(features: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings({"features": features})


def test_receipts_from_before_there_were_views_are_the_same_to_the_byte_and_digest() -> None:
    old = ShardReceipt.model_validate(receipt())
    assert old.origins == (ViewRow(IMAGE, "identity"),)
    assert json.loads(old.to_json()).keys() == receipt().keys()
    assert receipt_digest(old).startswith("1123e8db6338421b")


def test_a_receipt_of_views_has_the_parameters_of_crops_and_is_refused_where_it_contradicts_itself() -> None:
    crop = crop_view(IMAGE, 0, (0.8, 1.0))
    rows = [row_id(IMAGE, "hflip"), row_id(IMAGE, crop)]
    fields = receipt(rows=rows, images=[IMAGE, IMAGE], views=["hflip", crop])
    found = ShardReceipt.model_validate_json(ShardReceipt.model_validate(fields).to_json())
    assert found.origins == (ViewRow(IMAGE, "hflip"), ViewRow(IMAGE, crop))
    wrong: list[dict[str, Any]] = [
        {"views": ["vflip", crop]},
        {"views": [crop, "hflip"]},
        {"images": ["b" * 64, IMAGE]},
        {"views": ["hflip"]},
        {"images": None},
    ]
    for change in wrong:
        with pytest.raises(ValidationError):
            ShardReceipt.model_validate({**fields, **change})
