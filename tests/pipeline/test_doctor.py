"""`fpt doctor` as a user runs it: in a good study, in broken ones, and outside of any."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study import Study, make_study, save_weights

from pipeline import cli
from pipeline.params import dump_settings

KEYS = {"name", "status", "detail", "repair"}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_study(tmp_path_factory.mktemp("doctor") / "study", per_class=4)
    study.extract()
    (study.root / "params.yaml").write_text(dump_settings(study.settings))
    return study


@pytest.fixture
def root(extracted: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an extracted study, as the working directory."""
    root = Path(shutil.copytree(extracted.root, tmp_path / "study"))
    monkeypatch.setenv("FPT_CACHE_DIR", str(root / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(root)
    return root


def doctor(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and findings by name."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--json", *words])
    report = json.loads(capsys.readouterr().out)
    assert all(set(finding) == KEYS for finding in report["findings"])
    found = {finding["name"]: finding for finding in report["findings"]}
    assert len(found) == len(report["findings"])
    assert report["healthy"] == (stopped.value.code == 0)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, found


def failures(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, finding in found.items() if finding["status"] == "fail"}


def test_a_good_study(root: Path) -> None:
    before = sorted(path for path in root.rglob("*") if "index" not in path.parts)
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main(['doctor'])"],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed" in done.stderr
    for words in ("torchvision", "file locks", "lpm.safetensors fits test_vit", "12 images in 3 shards"):
        assert words in done.stdout
    assert "FAIL" not in done.stdout
    assert sorted(path for path in root.rglob("*") if "index" not in path.parts) == before, "it changes nothing"


def test_outside_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, found = doctor(capsys=capsys)
    assert code == 0
    assert {found[name]["status"] for name in ("settings", "model", "weights", "store")} == {"skipped"}
    assert found["torch"]["status"] == found["cache root"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_invalid_settings_fail_and_the_rest_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "params.yaml").write_text("method: fpt\ntrain:\n  lrr: 1\n  epochs: -1\n")
    code, found = doctor(capsys=capsys)
    assert code == 1
    assert failures(found) == {"settings"}
    assert "train.lrr" in found["settings"]["detail"] and "train.epochs" in found["settings"]["detail"]
    assert found["weights"]["status"] == found["store"]["status"] == "skipped"
    assert found["file locks"]["status"] == "ok"
    (root / "params.yaml").write_text("a: [")
    assert failures(doctor(capsys=capsys)[1]) == {"settings"}


def test_a_model_that_cannot_be_used(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor("--set", "lpm.name=resnet18", capsys=capsys)
    assert (code, failures(found)) == (1, {"model"})
    assert found["store"]["status"] == "ok", "the features that are there can still be trained on"


def test_missing_weights(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "lpm.safetensors").unlink()
    code, found = doctor(capsys=capsys)
    assert (code, failures(found)) == (1, {"weights"})
    assert "does not exist" in found["weights"]["detail"]
    assert "lpm.weights" in found["weights"]["repair"]


def test_weights_of_another_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor("--set", "lpm.name=test_vit2", capsys=capsys)
    assert (code, failures(found)) == (1, {"weights"})


def test_weights_of_a_hub_that_does_not_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, found = doctor("--set", "lpm.weights=hub", "--set", "lpm.name=test_vit.r160_in1k", capsys=capsys)
    assert (code, failures(found)) == (1, {"model hub"})
    assert found["weights"]["status"] == "skipped"


def test_a_store_that_is_gone_damaged_or_of_other_settings(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = doctor("--set", "features.ratio=0.5", capsys=capsys)
    assert found["store"]["status"] == "warn"
    assert "kept" in found["store"]["detail"]
    save_weights(root / "other.safetensors", seed=1)
    _, found = doctor("--set", "lpm.weights=other.safetensors", capsys=capsys)
    assert "weights_sha256" in found["store"]["detail"]
    shard = next((root / "cache").rglob("keys/c.1.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, found = doctor(capsys=capsys)
    assert (code, failures(found)) == (1, {"store"})
    assert shard.name in found["store"]["detail"]
    monkeypatch.setenv("FPT_CACHE_DIR", str(root / "elsewhere"))
    code, found = doctor(capsys=capsys)
    assert (code, failures(found)) == (1, {"store"})
    assert "FPT_CACHE_DIR" in found["store"]["detail"]


def test_a_cache_that_cannot_be_written(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "file").write_bytes(b"")
    monkeypatch.setenv("FPT_CACHE_DIR", str(root / "file" / "cache"))
    code, found = doctor(capsys=capsys)
    assert code == 1
    assert {"cache root", "file locks"} <= failures(found)
    assert "FPT_CACHE_DIR" in found["cache root"]["repair"]


def test_settings_that_are_named_but_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--params", str(tmp_path / "none.yaml")])
    assert stopped.value.code == 2
    assert "none.yaml" in capsys.readouterr().err


def fpt(*words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0, capsys.readouterr().err
    capsys.readouterr()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_store_begun_in_any_precision_fits_auto(
    precision: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPT_CACHE_DIR", str(root / "new cache"))
    text = (root / "params.yaml").read_text().replace("precision: float32", "precision: auto", 1)
    (root / "params.yaml").write_text(text)
    assert "precision: auto" in text
    fpt("extract", "--set", f"features.precision={precision}", capsys=capsys)
    code, found = doctor(capsys=capsys)
    assert code == 0
    assert found["store"]["status"] == "ok", found["store"]
    # Extraction agrees: there is nothing to compute.
    fpt("extract", capsys=capsys)
    assert len(list((root / "new cache").glob("*/features.zarr"))) == 1


def edit(key: str, value: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / "params.yaml").read_text()
        changed = re.sub(rf"(?m)^(  {key}:) .*$", rf"\1 {value}", text, count=1)
        assert changed != text
        (root / "params.yaml").write_text(changed)

    return change


def cut(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = min(root.glob(pattern))
        path.write_bytes(path.read_bytes()[:-1])

    return change


def drop(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = min(root.glob(pattern))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def flip(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = min(root.glob(pattern))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        edit("ratio", "0.5"),
        edit("dtype", "int8"),
        edit("precision", "bfloat16"),
        edit("weights", "other.safetensors"),
        cut("cache/*/features.zarr/keys/c.1.*"),
        drop("cache/*/features.zarr/keys/c.1.*"),
        drop("cache/*/receipts/000001.json"),
        cut("cache/*/receipts/000001.json"),
        drop("cache"),
        drop("cache/*/features.zarr"),
        drop("cache/*/features.zarr/zarr.json"),
        cut("cache/*/features.zarr/zarr.json"),
        drop("cache/*/index"),
        cut("outputs/features/receipt.json"),
        flip("outputs/features/receipt.json"),
    ],
    ids=lambda change: "-".join(str(cell.cell_contents) for cell in change.__closure__),
)
def test_a_followed_repair_makes_the_warning_go_away(
    damage: Callable[[Path], None], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(root / "other.safetensors", seed=1)
    damage(root)
    for _ in range(2):  # the repair of one may uncover another
        _, found = doctor(capsys=capsys)
        if found["store"]["status"] == "ok":
            break
        assert found["store"]["status"] in ("warn", "fail")
        repair = found["store"]["repair"]
        if "Move the folder away" in repair:
            shutil.move(min(root.glob("cache/*")), root / "away")
        command = re.search(r"`fpt ([^`]*)`", repair)
        fpt(*shlex.split(command[1] if command else repair.removeprefix("fpt ")), capsys=capsys)
    assert doctor(capsys=capsys)[1]["store"]["status"] == "ok", found["store"]


def test_the_repair_names_the_overrides(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--params", str(root / "params.yaml"), "--set", "features.ratio=0.5"]
    repair = doctor(*words, capsys=capsys)[1]["store"]["repair"]
    fpt(*shlex.split(repair)[1:], capsys=capsys)
    assert doctor(*words, capsys=capsys)[1]["store"]["status"] == "ok"


def test_a_store_that_is_read_from_its_remote(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "there").mkdir()
    fpt("cache", "push", str(root / "there"), capsys=capsys)
    monkeypatch.setenv("FPT_CACHE_DIR", str(root / "empty"))
    assert failures(doctor(capsys=capsys)[1]) == {"store"}
    code, found = doctor("--set", "store.remote=there", capsys=capsys)
    assert (code, found["store"]["status"]) == (0, "ok"), found["store"]


def test_repairs_of_threads_work_outside_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    finding = doctor(capsys=capsys)[1]["threads"]
    repair = re.match(r"Set OMP_NUM_THREADS or, in a study, compute\.threads to (\d+)", finding["repair"])
    assert finding["status"] == "warn" and repair
    monkeypatch.setenv("OMP_NUM_THREADS", repair[1])
    assert doctor(capsys=capsys)[1]["threads"]["status"] == "ok"
