"""`fpt evaluate --adapt`, `fpt predict --adapt`, `fpt bench --shift` and the Python API, as a user types them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Fpt
from study import make_images, make_study

import fpt as front_door
from pipeline.params import dump_settings
from stages.evaluate.predictions import read_predictions
from stages.manifest import read_manifest
from stages.predict import shifted

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 60 images of three classes at three sites, one of them only in the test split."""
    root = tmp_path_factory.mktemp("adapt")
    make_images(root / "images", 20)
    lines = ["path,label,site"]
    for path in sorted((root / "images").rglob("*.png")):
        number = int(path.stem.split("-")[1])
        site = "north" if number < 8 else "south" if number < 16 else "east"
        lines.append(f"{path.relative_to(root / 'images').as_posix()},{path.parent.name},{site}")
    (root / "labels.csv").write_text("\n".join(lines))
    data = {"images": "images", "labels": "labels.csv", "site_column": "site", "test_sites": ("east",)}
    study = make_study(root, method="linear", data=data, train={"epochs": 2})
    raw = study.settings.model_copy(update={"train": study.settings.train.model_copy(update={"order_seed": "auto"})})
    (study.root / "params.yaml").write_text(dump_settings(raw))
    return study.root


@pytest.fixture(autouse=True)
def trained(root: Path, fpt: Fpt) -> None:
    if not (root / "outputs/model").exists():
        fpt("extract", cwd=root)
        fpt("train", cwd=root)


@pytest.mark.parametrize(("adapt", "split"), [("foa", "test"), ("foa-shift", "train"), ("vptta", "test")])
def test_an_evaluation_shows_both_figures(root: Path, fpt: Fpt, adapt: str, split: str) -> None:
    words = ["evaluate", "--adapt", adapt, "--split", split, "--output", f"outputs/{adapt}"]
    out, _ = fpt(*words, "--adapt-batch", "8", cwd=root)
    assert "without" in out and "with adaptation" in out and f"Adapted by {adapt}" in out
    assert "order is drawn with the seed" in out and "shares of the classes" in out
    folder = root / "outputs" / adapt
    found = json.loads((folder / f"adapted-{adapt}/adapted.json").read_text())
    plain, adapted = read_predictions(folder / "predictions.parquet"), read_predictions(
        folder / f"adapted-{adapt}/predictions.parquet"
    )  # fmt: skip
    assert plain.rows == adapted.rows
    assert np.abs(plain.probabilities - adapted.probabilities).max() > 1e-4
    np.testing.assert_allclose(adapted.probabilities.sum(axis=1), 1, atol=1e-5)
    assert found["without"] == json.loads((folder / "metrics.json").read_text())
    assert found["adapted"] == json.loads((folder / f"adapted-{adapt}/metrics.json").read_text())
    assert any("without -> with adaptation: AUC" in one for one in found["adapted"]["warnings"])
    assert "not shifted" in out or adapt == "vptta"
    report = (folder / f"adapted-{adapt}/report.html").read_text()
    assert f"adapted by {adapt}" in report
    again = json.loads(fpt(*words, "--adapt-batch", "8", "--json", cwd=root)[0])
    assert again == found, "the same seed gives the same numbers"


def test_new_images_get_columns_of_both(root: Path, fpt: Fpt, tmp_path: Path) -> None:
    make_images(tmp_path / "others", 4, seed=5)
    (tmp_path / "others/grid/=broken.png").write_bytes(b"no image")
    words = ["predict", tmp_path / "others", "--adapt", "foa-shift", "--adapt-batch", "8"]
    _, err = fpt(*words, "--output", tmp_path / "p.csv", cwd=root, code=2)
    assert "12 of 13 images predicted" in err and "shares of the classes" in err
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    classes = ("grid", "plain", "stripe")
    assert list(rows[0]) == [
        "path", "predicted", *(f"p_{one}" for one in classes),
        "adapted_predicted", *(f"adapted_p_{one}" for one in classes), "error",
    ]  # fmt: skip
    assert [bool(row["error"]) for row in rows].count(True) == 1
    usable = [row for row in rows if not row["error"]]
    plain, _ = fpt("predict", tmp_path / "others/plain", cwd=root)
    of_path = {row["path"]: row for row in csv.DictReader(plain.splitlines())}
    for row in usable:
        adapted = {one: float(row[f"adapted_p_{one}"]) for one in classes}
        assert row["adapted_predicted"] == max(adapted, key=adapted.__getitem__)
        if row["path"] in of_path:
            assert float(row["p_grid"]) == pytest.approx(float(of_path[row["path"]]["p_grid"]), abs=1e-4)
    for name in ("p.parquet", "p.xlsx"):
        fpt(*words, "--output", tmp_path / name, cwd=root, code=2)
        assert (tmp_path / name).stat().st_size > 500
    (tmp_path / "others/grid/=broken.png").unlink()
    model = front_door.load(root / "outputs/model")
    predictions = model.predict(tmp_path / "others", adapt="foa-shift", adapt_batch=8)
    columns = predictions.to_dict()
    assert columns["adapted_predicted"] == [row["adapted_predicted"] for row in usable]
    _, err = fpt("predict", tmp_path / "others/plain", "--adapt", "foa", cwd=root, code=2)
    assert "at least 8 images, and there are 4" in err


def test_images_outside_of_the_study_and_the_api(root: Path, fpt: Fpt, tmp_path: Path) -> None:
    make_images(tmp_path / "others", 4, seed=5)
    words = ["evaluate", "--images", tmp_path / "others", "--adapt", "foa-shift", "--adapt-batch", "8"]
    found = json.loads(fpt(*words, "--output", tmp_path / "out", "--json", cwd=root)[0])
    assert (found["without"]["split"], found["adapted"]["images"]) == ("external", 12)
    study = front_door.open_study(root)
    options: dict[str, Any] = {"adapt": "foa-shift", "adapt_batch": 8}
    metrics = front_door.evaluate(study, images=tmp_path / "others", output=tmp_path / "api", **options)
    assert metrics.auc == found["adapted"]["auc"] and metrics.brier == found["adapted"]["brier"]
    # All of them cached: from the store, although neither the weights nor, for the adaptation, the images are there.
    gone = ["--set", "lpm.weights=gone.safetensors"]
    _, err = fpt("evaluate", "--images", root / "images", "--adapt", "foa-shift", *gone, "--output", tmp_path / "c",
                 cwd=root)  # fmt: skip
    assert "60 images from the cache, 0 computed" in err
    with pytest.raises(front_door.FptError, match="no adaptation named 'tent'"):
        front_door.evaluate(study, adapt="tent")


def test_what_cannot_be_adapted_is_refused_by_name(root: Path, fpt: Fpt, tmp_path: Path) -> None:
    fpt("train", "--method", "knn", "--output", "outputs/knn", cwd=root)
    for adapt in ("foa", "foa-shift"):
        _, err = fpt("evaluate", "--model", "outputs/knn/model", "--adapt", adapt, cwd=root, code=2)
        assert f"(knn) cannot be adapted by {adapt}" in err and "nearest-mean" in err
    # A model of an earlier version, away from its study.
    old = Path(shutil.copytree(root / "outputs/model", tmp_path / "old/model"))
    (old / "source.safetensors").unlink()
    make_images(tmp_path / "others", 4, seed=5)
    weights = ["--set", f"lpm.weights={root / 'lpm.safetensors'}"]
    words = ["predict", tmp_path / "others", "--model", old, *weights, "--adapt", "foa-shift"]
    _, err = fpt(*words, cwd=tmp_path, code=2)
    assert "no statistics of source images" in err and "fpt evaluate --adapt foa-shift" in err
    fpt("evaluate", "--model", old, "--adapt", "foa-shift", "--output", tmp_path / "out", cwd=root)
    assert (tmp_path / "old/model-source/source.safetensors").exists()
    fpt(*words, cwd=tmp_path)


def test_a_shift_bench_shares_the_lpm_and_resumes(root: Path, fpt: Fpt, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    compute = shifted.compute_features

    def counted(lpm: Any, spec: Any, pixels: Any, device: Any) -> Any:
        passes.append(len(pixels))
        return compute(lpm, spec, pixels, device)

    monkeypatch.setattr(shifted, "compute_features", counted)
    words = ["bench", "--methods", "linear,fpt+,knn", "--samplings", "1", "--rates", "1e-3", "--adapt-batch", "8"]
    shift = ["--shift", "--shifts", "noise,jpeg,site", "--strengths", "1,5"]
    _, err = fpt(*words, *shift, "--plan", cwd=root)
    tested = len(list(read_manifest(root / "outputs/manifest/manifest.parquet").of("test")))
    assert tested == 12
    assert "6 conditions: unchanged, noise 1, noise 5, jpeg 1, jpeg 5, site east" in err
    assert f"{6 * tested} passes of the LPM" in err
    out, err = fpt(*words, *shift, cwd=root)
    assert sum(passes) == 6 * tested, "each image of each condition once, for three methods"
    assert "AUC" in out and "ECE" in out and "knn with foa-shift: It has no vector" in err
    folder = root / "outputs/bench"
    result = json.loads((folder / "shift.json").read_text())
    lines = list(csv.DictReader((folder / "shift.csv").open()))
    assert len(lines) == len(result["rows"]) == 6 * 5
    assert {(line["method"], line["adapt"]) for line in lines} == {
        ("linear", "none"), ("linear", "foa-shift"), ("fpt+", "none"), ("fpt+", "foa-shift"), ("knn", "none"),
    }  # fmt: skip
    page = (folder / "shift.html").read_text()
    assert "site east" in page and "<script" not in page
    # Unchanged images have the figures of the bench.
    bench = json.loads((folder / "bench.json").read_text())["shots"]["all"]
    for method in ("linear", "fpt+", "knn"):
        (row,) = [one for one in lines if (one["method"], one["shift"], one["adapt"]) == (method, "unchanged", "none")]
        assert float(row["auc"]) == pytest.approx(bench[method]["auc"]["mean"], abs=0.02)
    # Nothing is computed twice, and another adaptation only itself.
    passes.clear()
    fpt(*words, *shift, cwd=root)
    assert passes == []
    fpt(*words, *shift, "--adapts", "foa-shift,foa", "--methods", "fpt+", cwd=root)
    assert sum(passes) == 6 * tested
    assert json.loads((folder / "shift.json").read_text())["rows"][0]["metrics"]["auc"]["values"]


@pytest.mark.parametrize("words", [("--strengths", "6"), ("--shifts", "rain"), ("--adapts", "tent")])
def test_mistakes_are_named(root: Path, fpt: Fpt, words: tuple[str, str]) -> None:
    _, err = fpt("bench", "--methods", "linear", "--shift", *words, cwd=root, code=2)
    assert f"{words[0]} cannot be read" in err and words[1] in err
