"""`fpt cache`: every verb on a finished study, as a user sees it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from web import served

pytestmark = pytest.mark.timeout(600)


def stores(study: Path) -> list[Path]:
    return sorted((study / ".fpt" / "cache").iterdir())


def test_ls_and_path(study: Path, fpt: Fpt) -> None:
    assert fpt("cache", "path", cwd=study)[0].strip() == str(study / ".fpt" / "cache")
    fpt("extract", cwd=study)
    (listed,) = json.loads(fpt("cache", "ls", "--json", cwd=study)[0])["stores"]
    assert (listed["rows"], listed["shards"], listed["spec"]["lpm"]["name"]) == (40, 10, "test_vit.r160_in1k")
    assert str(study) in listed["studies"]
    out, err = fpt("cache", "ls", cwd=study)
    assert all(word in out for word in ("test_vit", "int8", "40 in 10 shards", listed["fingerprint"][:16]))
    assert "1 store," in err


def test_verify_names_the_images_and_repair_costs_just_those(study: Path, fpt: Fpt) -> None:
    out, _ = fpt("cache", "verify", cwd=study)
    assert "complete, 40 rows in 10 shards" in out
    shard = next(stores(study)[0].rglob("keys/c.3.*"))
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    report = json.loads(fpt("cache", "verify", "--json", cwd=study, code=2)[0])
    assert not report["whole"]
    (store,) = report["stores"]
    assert [damage["kind"] for damage in store["damages"]] == ["flipped"]
    assert len(store["images"]) == len(store["paths"]) == 4
    out, err = fpt("cache", "verify", stores(study)[0].name[:6], cwd=study, code=2)
    assert "flipped: features.zarr/keys/c.3" in out
    assert store["paths"][0] in out
    assert "--repair" in err
    fpt("cache", "verify", "--repair", cwd=study, code=2)
    assert "36 were in the cache, computed 4 " in fpt("extract", cwd=study)[1]
    fpt("cache", "verify", cwd=study)
    assert "begins with zz" in fpt("cache", "verify", "zz", cwd=study, code=2)[1]


def test_verify_reports_missing_and_unreadable_stores(study: Path, fpt: Fpt) -> None:
    (stores(study)[0] / "features.zarr" / "zarr.json").write_text("{")
    assert "cannot be read" in fpt("cache", "verify", cwd=study, code=2)[0]
    assert "cannot be read" in fpt("cache", "ls", cwd=study)[0]
    shutil.rmtree(stores(study)[0])
    assert "is gone" in fpt("cache", "verify", cwd=study, code=2)[0]


def test_gc_shows_first_and_deletes_on_yes(study: Path, fpt: Fpt) -> None:
    shutil.rmtree(stores(study)[0] / "used-by")  # the study that this one is a copy of
    fpt("extract", cwd=study)
    assert "Nothing to delete" in fpt("cache", "gc", "--yes", cwd=study)[1]
    fpt("extract", "--set", "features.ratio=0.1", cwd=study)
    first, second = (path for path in stores(study))
    assert first.name != second.name
    out, err = fpt("cache", "gc", cwd=study)
    assert "complete store" in out
    assert "Next: fpt cache gc --yes" in err
    assert len(stores(study)) == 2
    report = json.loads(fpt("cache", "gc", "--yes", "--json", cwd=study)[0])
    assert report["freed"] > 0
    (left,) = stores(study)
    assert left.name == json.loads((study / "outputs/features/receipt.json").read_text())["fingerprint"][:16]


def test_train_registers_the_study(study: Path, fpt: Fpt) -> None:
    shutil.rmtree(stores(study)[0] / "used-by")
    fpt("train", cwd=study)
    (listed,) = json.loads(fpt("cache", "ls", "--json", cwd=study)[0])["stores"]
    assert listed["studies"] == [str(study)]


def test_one_machine_extracts_and_another_trains(study: Path, tmp_path: Path, fpt: Fpt) -> None:
    _, err = fpt("cache", "push", tmp_path / "shared", cwd=study)
    assert "10 shards copied" in err
    cold = Path(shutil.copytree(study, tmp_path / "cold", symlinks=True))
    shutil.rmtree(cold / ".fpt")
    (cold / "outputs" / "features" / "receipt.json").unlink()
    fpt("extract", "--set", "features.ratio=0.1", cwd=study)
    fpt("cache", "push", tmp_path / "shared", cwd=study)
    report = json.loads(fpt("cache", "pull", tmp_path / "shared", "--json", cwd=cold)[0])
    assert [(store["copied"], store["failures"]) for store in report["stores"]] == [(10, [])], "what fits the study"
    _, err = fpt("cache", "pull", tmp_path / "shared", cwd=cold)
    assert "0 shards copied" in err
    assert "Next: fpt extract" in err
    assert "40 were in the cache, computed 0." in fpt("extract", cwd=cold)[1]
    fpt("train", cwd=cold)
    (listed,) = json.loads(fpt("cache", "ls", "--json", cwd=cold)[0])["stores"]
    fewer = ["--set", f"features.layers=[{listed['spec']['layers'][-1]}]"]
    report = json.loads(fpt("cache", "pull", tmp_path / "shared", *fewer, "--json", cwd=cold)[0])
    assert [store["present"] for store in report["stores"]] == [10], "a store of more layers will do"
    assert "40 (from another store: 40)" in fpt("extract", "--plan", *fewer, cwd=cold)[0]
    _, err = fpt("extract", *fewer, cwd=cold)
    assert "40 were in the cache (40 copied from another store), computed 0." in err
    _, err = fpt("cache", "pull", tmp_path / "shared", "--set", f"lpm.weights={tmp_path / 'none'}", cwd=cold)
    assert "is missing" in err
    other = cold / "other.safetensors"
    other.write_bytes(b"other")
    _, err = fpt("cache", "pull", tmp_path / "shared", "--set", f"lpm.weights={other}", cwd=cold)
    assert "not the one" in err


def test_pull_lists_the_available_stores_and_fails_for_damaged_shards(study: Path, tmp_path: Path, fpt: Fpt) -> None:
    fpt("cache", "push", tmp_path / "shared", stores(study)[0].name, cwd=study)
    _, err = fpt("cache", "pull", tmp_path / "shared", "--set", "features.ratio=0.5", cwd=study, code=2)
    assert f"Stores there: {stores(study)[0].name}" in err
    shard = next((tmp_path / "shared").rglob("keys/c.3.*"))
    shard.write_bytes(b"!" * shard.stat().st_size)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    _, err = fpt("cache", "pull", tmp_path / "shared", cwd=elsewhere, code=2)
    assert "9 shards copied" in err
    assert "shard 3: its file of keys was damaged" in err
    assert "nothing://x" in fpt("cache", "pull", "nothing://x", cwd=elsewhere, code=2)[1]


def test_training_reads_the_store_where_it_was_pushed_to(study: Path, tmp_path: Path, fpt: Fpt) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    fpt("extract", cwd=study)
    fpt("train", "--output", tmp_path / "local", cwd=study)
    fpt("cache", "push", tmp_path / "there", cwd=study)
    cache = study / ".fpt" / "cache"
    cache.rename(study / ".fpt" / "aside")
    try:
        assert "store.remote" in fpt("train", "--output", tmp_path / "none", cwd=study, code=2)[1]
        with served(tmp_path / "there") as (url, _):
            remote = ("--set", f"store.remote={url}")
            _, err = fpt("train", *remote, "--output", tmp_path / "web", cwd=study)
            assert "the network is read once" in err
            fpt("evaluate", *remote, "--model", tmp_path / "web/model", "--output", tmp_path / "evaluated", cwd=study)
            never = ("--set", "store.memory_budget=0", "--output", tmp_path / "unheld")
            _, err = fpt("train", *remote, *never, cwd=study)
            assert f"read from {url}" in err
            assert "in every epoch" in err
            assert "fpt cache pull" in err
        _, err = fpt("train", "--set", f"store.remote={tmp_path}/there", "--output", tmp_path / "folder", cwd=study)
        assert "the disk is read once" in err
        assert not cache.exists()
    finally:
        (study / ".fpt" / "aside").rename(cache)
    weights = {(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("local", "web", "folder")}
    assert len(weights) == 1
    assert (tmp_path / "evaluated/metrics.json").exists()


def test_views_from_plan_to_model(study: Path, fpt: Fpt) -> None:
    with_views = ["extract", "--set", "features.views=[identity,hflip,rot180]", "--set", "features.crops=1"]
    views = with_views[1:]
    plan = json.loads(fpt(*with_views, "--plan", "--json", cwd=study)[0])
    assert (plan["images"], plan["cached"]) == (40, 40)
    new = plan["to_compute"]
    assert plan["rows"] == 40 + new
    assert new % 3 == 0
    assert f"40 ({plan['rows']} rows with their views)" in fpt(*with_views, "--plan", cwd=study)[0]
    refused = fpt("train", *views, cwd=study, code=2)[1]
    assert "hflip, rot180, 1 crop of 0.8 to 1 of the area" in refused
    assert "fpt extract" in refused
    done = fpt(*with_views, cwd=study)[1]
    assert f"40 images ({40 + new} rows with their views): 40 were in the cache, computed {new}" in done
    assert json.loads(fpt(*with_views, "--json", cwd=study)[0])["rows"] == 40 + new
    assert f"{40 + new} rows in" in fpt("cache", "verify", cwd=study)[0]
    (store,) = (study / ".fpt" / "cache").iterdir()
    receipts = [path for path in sorted((store / "receipts").iterdir()) if "rot180" in path.read_text()]
    images = json.loads(receipts[0].read_text())["images"]
    receipts[0].write_text("{")
    (found,) = json.loads(fpt("cache", "verify", "--json", cwd=study, code=2)[0])["stores"]
    assert set(found["images"]) == set(images)
    assert len(found["paths"]) == len(set(images))
    fpt("cache", "verify", "--repair", cwd=study, code=2)
    assert f"computed {len(images)} in" in fpt(*with_views, cwd=study)[1]
    fpt("train", *views, cwd=study)
    fpt("evaluate", *views, cwd=study)
    settings = yaml.safe_load((study / "outputs/model/settings.yaml").read_text())
    assert settings["features"]["views"] == ["identity", "hflip", "rot180"]


def test_a_moved_study_keeps_its_features(
    study: Path, tmp_path: Path, fpt: Fpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(stores(study)[0] / "used-by")
    shared = tmp_path / "shared"
    (study / ".fpt/cache").rename(shared)
    monkeypatch.setenv("FPT_CACHE_DIR", str(shared))
    fpt("extract", cwd=study)
    (store,) = shared.iterdir()
    moved = study.rename(tmp_path / "renamed")
    bystander = tmp_path / "bystander"
    bystander.mkdir()
    for place in (bystander, moved):
        _, err = fpt("cache", "gc", "--yes", cwd=place)
        assert "Nothing to delete" in err
    assert "complete, 40 rows in 10 shards" in fpt("cache", "verify", cwd=moved)[0]
    listed = json.loads(fpt("cache", "gc", "--json", cwd=bystander)[0])["unreachable"]
    assert [(item["study"], item["stores"]) for item in listed] == [(str(study), [store.name])]
    out, err = fpt("cache", "gc", cwd=bystander)
    assert str(study) in out
    assert "its folder does not exist" in out
    assert "--forget" in err
    assert "can be reached" in fpt("cache", "gc", "--forget", moved, cwd=bystander, code=2)[1]
    fpt("cache", "gc", "--yes", "--forget", study, cwd=bystander)
    assert store.is_dir(), "the study is noted in its new place"
    assert json.loads(fpt("cache", "gc", "--json", cwd=bystander)[0])["unreachable"] == []
    deleted = moved.rename(tmp_path / "deleted") and moved
    assert "Nothing to delete" in fpt("cache", "gc", "--yes", cwd=bystander)[1]
    out, err = fpt("cache", "gc", "--forget", deleted, cwd=bystander)
    assert "complete store" in out
    assert f"fpt cache gc --yes --forget {deleted}" in err
    fpt("cache", "gc", "--yes", "--forget", deleted, cwd=bystander)
    assert list(shared.iterdir()) == []
