"""Extraction as a whole: only what is missing is computed, and what is there is never wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image
from study import Study, make_images, make_study

from schemas.errors import StorageError, UnreadableImagesError
from stages.extract.extractor import ExtractProgress
from stages.extract.features import compute_features, to_pixels
from stages.extract.plan import plan_extraction
from stages.images import read_image
from stages.lpm.loading import load_lpm
from stages.store.extraction_receipt import read_extraction_receipt
from stages.store.layout import Store, open_store_layout
from stages.store.reader import open_store


class Killed(BaseException):
    """What a kill signal looks like from inside: nothing but `finally` runs."""


def rows_of(store: Store) -> dict[str, np.ndarray[Any, Any]]:
    group = zarr.open_group(store.group, mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def count_forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through the LPM from now on."""
    sizes: list[int] = []

    def counted(lpm: Any, spec: Any, images: Any, device: Any) -> Any:
        sizes.append(len(images))
        return compute_features(lpm, spec, images, device)

    monkeypatch.setattr("stages.extract.shard_task.compute_features", counted)
    return sizes


def test_every_image_gets_the_features_of_its_own_content(study: Study) -> None:
    receipt = study.extract()
    assert receipt == read_extraction_receipt(study.features / "receipt.json")
    assert receipt.images == 24
    assert len(receipt.shards) == 6
    reader = open_store(study.cache, receipt)
    lpm = load_lpm(study.settings.lpm, 64, study.root)
    for row in study.manifest.rows[::5]:
        image = read_image(study.root / "images" / row.path, max_pixels=10**6)
        alone = compute_features(lpm, receipt.spec, [to_pixels(image, receipt.spec)])
        found = reader.read([row.id], ["keys", "values", "indices", "side"])
        assert np.array_equal(found["indices"], alone["indices"])
        assert np.array_equal(found["side"], alone["side"])
        np.testing.assert_allclose(found["keys"], alone["keys"], atol=2e-3)


def test_a_second_run_computes_nothing_and_loads_no_lpm(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    first = study.extract()

    def forbidden(*_: object) -> None:
        raise AssertionError("the LPM was loaded")

    monkeypatch.setattr("stages.extract.shard_task.load_lpm", forbidden)
    seen: list[ExtractProgress] = []
    assert study.extract(progress=seen.append) == first
    assert [(p.done, p.total, p.cached) for p in seen] == [(24, 24, 24)]


def test_a_new_image_computes_only_itself_and_rewrites_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = study.extract()
    store = open_store_layout(study.cache, receipt.spec)
    before = {path: path.stat().st_mtime_ns for path in store.group.rglob("c.*")}
    make_images(study.root / "images", 1, seed=7)
    study.prepare()
    sizes = count_forward_passes(monkeypatch)
    grown = study.extract()
    assert sum(sizes) == 3
    assert len(grown.shards) == 7
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_renaming_and_resplitting_hit_the_cache(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.extract()
    for path in (study.root / "images").rglob("*.png"):
        path.rename(path.with_name(f"renamed-{path.name}"))
    study.settings = study.changed(data={"seed": 5})
    study.prepare()
    sizes = count_forward_passes(monkeypatch)
    assert study.extract().images == 24
    assert sizes == []


def test_a_killed_run_loses_one_shard_and_ends_with_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, killed = make_study(tmp_path / "a"), make_study(tmp_path / "b")
    expected = calm.extract()

    def die(progress: ExtractProgress) -> None:
        if progress.done >= 14:
            raise Killed

    with pytest.raises(Killed):
        killed.extract(progress=die)
    assert not (killed.features / "receipt.json").exists()
    store = open_store_layout(killed.cache, expected.spec)
    assert len(store.finished_shards()) == 3
    sizes = count_forward_passes(monkeypatch)
    assert killed.extract() == expected
    assert sum(sizes) == 12
    left, right = rows_of(open_store_layout(calm.cache, expected.spec)), rows_of(store)
    for name, values in left.items():
        assert np.array_equal(values, right[name]), name


def test_damage_is_mended_by_the_next_extraction(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = study.extract()
    store = open_store_layout(study.cache, expected.spec)
    store.shard_file("keys", 1).unlink()
    data = bytearray(store.shard_file("values", 3).read_bytes())
    data[10] ^= 1
    store.shard_file("values", 3).write_bytes(data)
    sizes = count_forward_passes(monkeypatch)
    seen: list[ExtractProgress] = []
    # A lost file shows in its length; a flipped bit only when every byte is compared.
    study.extract(progress=seen.append)
    assert (sum(sizes), seen[-1].repaired) == (4, 1)
    checked: list[tuple[str, int, int]] = []
    assert study.extract(check=True, preparing=lambda *step: checked.append(step)) == expected
    assert checked[-1] == ("check", 6, 6)
    assert sum(sizes) == 8
    shutil.rmtree(study.cache)
    assert study.extract() == expected


def test_images_that_broke_since_prepare_are_all_listed_and_the_rest_is_kept(study: Study) -> None:
    folder = study.root / "images"
    gone, cut, changed = (folder / row.path for row in study.manifest.rows[3:6])
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    Image.new("RGB", (72, 64)).save(changed)
    with pytest.raises(UnreadableImagesError, match="fpt prepare") as caught:
        study.extract()
    reasons = dict(caught.value.failures)
    assert set(reasons) == {str(gone), str(cut), str(changed)}
    assert "changed" in reasons[str(changed)]
    assert not (study.features / "receipt.json").exists()
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.cached, plan.to_compute) == (21, 3)


def test_the_plan_computes_nothing_and_tells_what_the_run_writes(study: Study) -> None:
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert not study.cache.exists()
    assert (plan.images, plan.cached, plan.to_compute, plan.estimate) == (24, 0, 24, "probe")
    receipt = study.extract()
    store = open_store_layout(study.cache, receipt.spec)
    written = [*store.group.rglob("c.*"), *store.receipts.iterdir()]
    assert len(written) == plan.files
    size = sum(path.stat().st_size for path in store.group.rglob("c.*"))
    assert plan.bytes < size < 1.1 * plan.bytes + 24 * 200
    after = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (after.to_compute, after.bytes, after.files, after.estimate) == (0, 0, 0, "receipts")


def test_too_little_space_is_noticed_before_anything_is_computed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_forward_passes(monkeypatch)
    usage = shutil.disk_usage(study.root)._replace(free=1000)
    monkeypatch.setattr("stages.extract.extractor.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="FPT_CACHE_DIR"):
        study.extract()
    assert sizes == []


def test_studies_share_rows_of_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_study(tmp_path / "a", per_class=4), make_study(tmp_path / "b", per_class=6)
    first.extract()
    sizes = count_forward_passes(monkeypatch)
    shutil.copytree(first.cache, second.cache)
    second.extract()
    shared = set(first.manifest.ids()) & set(second.manifest.ids())
    assert len(shared) >= 4
    assert sum(sizes) == 18 - len(shared)
