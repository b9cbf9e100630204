"""`fpt doctor` as a user runs it: in a good study, in broken ones, and outside of any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
    assert "Nothing here would fail." in done.stderr
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
