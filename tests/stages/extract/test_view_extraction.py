"""Views as rows of the store: their geometry, what they cost, who keeps them, and how damage to them is named."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from study import Study, make_study

from schemas.errors import UnreadableImagesError
from schemas.features import ExtractionReceipt
from schemas.manifest import ManifestRow
from schemas.views import ViewRow, crop_view, manifest_rows
from stages.extract.extractor import ExtractProgress
from stages.extract.features import compute_features, to_pixels
from stages.extract.plan import plan_extraction
from stages.extract.views import apply_view, crop_box
from stages.images import decoded_image, read_image
from stages.lpm.loading import load_lpm
from stages.store.layout import Store, open_store_layout
from stages.store.manage.gc import drop_garbage, find_garbage
from stages.store.manage.transfer import pull, push
from stages.store.manage.usage import live_uses
from stages.store.manage.verify import repair_store, verify_store
from stages.store.reader import open_store, read_receipt
from stages.store.remote import open_remote, remote_stores

NAMES = ("keys", "values", "indices", "pooled", "side")
TURNS = ("hflip", "vflip", "rot90", "rot180", "rot270")
ON_ARRAYS: dict[str, Any] = {
    "hflip": lambda pixels: pixels[:, ::-1],
    "vflip": lambda pixels: pixels[::-1],
    "rot90": np.rot90,
    "rot180": lambda pixels: pixels[::-1, ::-1],
    "rot270": lambda pixels: np.rot90(pixels, 3),
}


def with_views(study: Study, *views: str, **more: Any) -> None:
    study.settings = study.changed(features={"views": ("identity", *views), **more})


def computed_rows(study: Study, **keywords: Any) -> tuple[ExtractionReceipt, int]:
    """The receipt, and how many rows went through the LPM."""
    seen: list[ExtractProgress] = []
    receipt = study.extract(progress=seen.append, **keywords)
    assert seen[-1].done == seen[-1].total
    return receipt, seen[-1].total - seen[-1].cached


def training(study: Study) -> list[ManifestRow]:
    return list(study.manifest.of("train"))


def origins(store: Store) -> dict[int, tuple[ViewRow, ...]]:
    """What each shard holds, by its receipt."""
    return {shard: read_receipt(store, shard).origins for shard in store.finished_shards()}


@pytest.mark.parametrize("view", TURNS)
def test_flips_and_turns_are_exact(view: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)
    turned = np.asarray(apply_view(Image.fromarray(pixels), view))
    assert np.array_equal(turned, ON_ARRAYS[view](pixels))


def test_a_crop_is_that_part_of_the_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 100, 3), np.uint8)
    found = np.asarray(apply_view(Image.fromarray(pixels), "crop:0.100000,0.050000,0.800000,0.900000"))
    assert np.array_equal(found, pixels[20:180, 5:95])
    with pytest.raises(ValueError, match="not a view"):
        apply_view(Image.fromarray(pixels), "sideways")


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (5000, 16)])
def test_crops_of_any_image_have_pixels_and_stay_inside(size: tuple[int, int]) -> None:
    for number in range(50):
        left, top, right, bottom = crop_box(crop_view("0" * 64, number, (0.01, 1.0)), size)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_a_row_has_the_features_and_the_side_image_of_the_file_turned_or_cropped_alike(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=3, compute={"extract_batch_size": 1})
    with_views(study, *TURNS, crops=2)
    receipt = study.extract()
    reader, lpm = open_store(study.cache, receipt), load_lpm(study.settings.lpm, 64, study.root)
    row = training(study)[-1]
    original = np.asarray(Image.open(study.root / "images" / row.path).convert("RGB"))
    views: dict[str, Any] = {view: turn(original) for view, turn in ON_ARRAYS.items()}
    for number in (0, 1):
        view = crop_view(row.id, number, (0.8, 1.0))
        left, top, right, bottom = crop_box(view, (72, 64))
        views[view] = original[top:bottom, left:right]
    for view, pixels in views.items():
        Image.fromarray(pixels).save(tmp_path / "turned.png")
        image = read_image(tmp_path / "turned.png", max_pixels=10**6)
        alone = compute_features(lpm, receipt.spec, [to_pixels(image, receipt.spec)])
        found = reader.read([ViewRow(row.id, view).row_id], NAMES)
        for name in NAMES:
            assert np.array_equal(found[name], alone[name]), (view, name)


def test_only_training_images_get_views_and_adding_a_view_computes_just_that(study: Study) -> None:
    plain, computed = computed_rows(study)
    assert computed == 24
    count = len(training(study))
    assert 0 < count < 24
    with_views(study, "hflip")
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.images, plan.rows, plan.cached, plan.to_compute) == (24, 24 + count, 24, count)
    assert plan.bytes == count * plan.bytes_per_image
    before = {path: path.stat().st_mtime_ns for path in study.cache.rglob("c.*")}
    receipt, computed = computed_rows(study)
    assert computed == count
    assert (receipt.fingerprint, receipt.images, receipt.views) == (plain.fingerprint, 24, ("identity", "hflip"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    store = open_store_layout(study.cache, receipt.spec)
    files = set(store.group.rglob("c.*")) - set(before)
    assert len(files) + len(store.finished_shards()) - len(plain.shards) == plan.files
    with_views(study, "hflip", "rot90", crops=2)
    assert computed_rows(study)[1] == 3 * count
    assert computed_rows(study)[1] == 0


def test_another_split_computes_the_views_of_the_images_that_are_new_in_training(study: Study) -> None:
    with_views(study, "hflip")
    study.extract()
    before = {row.id for row in training(study)}
    study.settings = study.changed(data={"seed": 3})
    study.prepare()
    new = {row.id for row in training(study)} - before
    assert new
    assert computed_rows(study)[1] == len(new)


def test_shards_hold_images_or_views_and_receipts_have_the_parameters_of_the_crops(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=5)  # not a multiple of the shard's rows
    with_views(study, "vflip", crops=1, crop_scale=(0.5, 0.6))
    receipt = study.extract()
    assert (receipt.crops, receipt.crop_scale) == (1, (0.5, 0.6))
    shards = origins(open_store_layout(study.cache, receipt.spec))
    assert {row for rows in shards.values() for row in rows} == set(
        manifest_rows(study.manifest, study.settings.features)
    )
    kinds = [{row.view == "identity" for row in rows} for rows in shards.values()]
    assert all(len(kind) == 1 for kind in kinds)
    crops = {row.image: row.view for rows in shards.values() for row in rows if row.view.startswith("crop:")}
    assert crops == {row.id: crop_view(row.id, 0, (0.5, 0.6)) for row in training(study)}


def test_an_image_is_decoded_once_for_all_its_views(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.extract()
    decoded: list[str] = []

    def counted(path: Path, **keywords: Any) -> AbstractContextManager[Image.Image]:
        decoded.append(str(path))
        return decoded_image(path, **keywords)

    monkeypatch.setattr("stages.extract.shard_task.decoded_image", counted)
    with_views(study, *TURNS, crops=3)
    study.extract()
    assert len(decoded) == len(set(decoded)) == len(training(study))


def test_an_image_that_broke_is_named_once_and_has_no_view(study: Study) -> None:
    with_views(study, "hflip", "vflip")
    broken = training(study)[2]
    path = study.root / "images" / broken.path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnreadableImagesError) as caught:
        study.extract()
    assert [name for name, _ in caught.value.failures] == [str(path)]
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert plan.to_compute == 3


def test_damage_to_views_names_the_images_and_costs_just_their_views(study: Study) -> None:
    with_views(study, "hflip", "rot90")
    receipt = study.extract()
    store = open_store_layout(study.cache, receipt.spec)
    shards = {shard: rows for shard, rows in origins(store).items() if rows[0].view != "identity"}
    first, second, third, *_ = shards
    with store.shard_file("keys", first).open("r+b") as file:
        file.write(b"\xff\x00\xff\x00\xff")
    store.receipt(second).write_text("{")
    wanted = {row.row_id: row.image for row in manifest_rows(study.manifest, receipt)}
    found = verify_store(store, live_uses(store.path), wanted)
    assert [(damage.kind, damage.shard) for damage in found.damages] == [("flipped", first), ("receipt", second)]
    images = {row.image for shard in (first, second) for row in shards[shard]}
    assert set(found.images) == images
    for path in [store.receipt(third), *store.group.glob(f"*/c.{third}.*")]:
        path.unlink()
    found = verify_store(store, live_uses(store.path), wanted)
    assert set(found.images) == images | {row.image for row in shards[third]}
    repair_store(store, found)
    again, computed = computed_rows(study)
    assert computed == sum(len(shards[shard]) for shard in (first, second, third))
    assert again == receipt
    assert verify_store(store, live_uses(store.path), wanted).damages == ()


def test_garbage_collection_keeps_views_until_no_study_has_them(tmp_path: Path) -> None:
    one, other = make_study(tmp_path / "a", per_class=4), make_study(tmp_path / "b", per_class=4)
    shutil.rmtree(other.root / "cache", ignore_errors=True)
    (other.root / "cache").symlink_to(one.cache)
    plain = one.extract()
    with_views(one, "hflip")
    viewed = one.extract()
    assert other.extract().shards == plain.shards
    assert find_garbage(one.cache) == []
    with_views(one)
    assert one.extract().shards == plain.shards
    (garbage,) = find_garbage(one.cache)
    assert not garbage.whole
    assert {str(shard) for shard in garbage.shards} == viewed.shards.keys() - plain.shards.keys()
    assert drop_garbage(one.cache, [garbage]) == garbage.bytes > 0
    with_views(one, "hflip")
    assert computed_rows(one)[1] == len(training(one))


def test_views_extracted_together_with_their_images_can_be_given_up_too(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=5)
    with_views(study, "hflip")
    study.extract()
    with_views(study)
    study.extract()
    (garbage,) = find_garbage(study.cache)
    assert len(garbage.shards) == -(-len(training(study)) // 4)


def test_views_travel_with_their_names(study: Study, tmp_path: Path) -> None:
    with_views(study, "rot270", crops=1)
    receipt = study.extract()
    store = open_store_layout(study.cache, receipt.spec)
    remote = open_remote(f"memory://{tmp_path.name}")
    push(store, remote)
    (there,) = remote_stores(remote)
    shutil.rmtree(study.cache)
    pull(there, study.cache)
    assert computed_rows(study) == (receipt, 0)
    assert set().union(*origins(store).values()) == set(manifest_rows(study.manifest, receipt))


def test_views_are_copied_from_a_store_of_more_layers(study: Study) -> None:
    with_views(study, "hflip")
    full = study.extract()
    with_views(study, "hflip", layers=study.settings.features.layers[-1:])
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.reused, plan.to_compute) == (plan.rows, 0)
    part, computed = computed_rows(study)
    assert computed == 0
    store = open_store_layout(study.cache, part.spec)
    assert len([*store.group.rglob("c.*"), *store.receipts.iterdir()]) == plan.files
    assert origins(store) == origins(open_store_layout(study.cache, full.spec))
    assert verify_store(store).damages == ()
