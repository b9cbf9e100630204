"""The baselines by hand: train, evaluate, predict and compare on one study."""

import json
from pathlib import Path

import pytest
from command_line import Fpt
from study_tools import draw_images

from stages.manifest import read_manifest
from stages.train.bundle import load_bundle

# The first test here waits for the whole pipeline, which a loaded machine runs in minutes.
pytestmark = pytest.mark.timeout(600)

METHODS = ("side", "statistics", "linear", "knn", "attentive")


def test_every_baseline_from_training_to_the_table(study: Path, fpt: Fpt) -> None:
    for method in METHODS:
        folder = Path("outputs") / method
        _, err = fpt("train", "--method", method, "--output", folder, cwd=study)
        follow = err[err.index("Next: fpt ") + len("Next: fpt ") :].split()
        fpt(*follow, cwd=study)
        said = [part in err for part in ("C = ", "k = ", "share of ")]
        assert said == [method == chosen for chosen in ("linear", "knn", "statistics")]
        assert f"method: {method}" in (study / folder / "model/settings.yaml").read_text()
        log = json.loads((study / folder / "train/metrics.json").read_text())
        assert log["seconds"] >= 0
        assert log["val"]["loss"] > 0
    out, _ = fpt("compare", "outputs/evaluation", *(f"outputs/{method}" for method in METHODS), "--json", cwd=study)
    comparison = json.loads(out)
    assert [row["model"]["method"] for row in comparison["models"]] == ["fpt+", *METHODS]
    for row in comparison["models"]:
        assert row["train_seconds"] is not None
        place = study / ("outputs" if row["name"] == "outputs/evaluation" else row["name"])
        assert row["model"]["learnable"] == load_bundle(place / "model").spec.learnable
        metrics = json.loads((place / "evaluation/metrics.json").read_text())
        assert row["metrics"] == metrics
    out, _ = fpt("compare", "outputs/evaluation", "outputs/linear", cwd=study)
    for said in ("fpt+", "linear", "Difference to outputs/evaluation", "balanced accuracy", "learnable"):
        assert said in out


def test_the_time_of_another_training_is_not_shown(study: Path, fpt: Fpt) -> None:
    fpt("train", "--method", "knn", "--output", "outputs/knn", cwd=study)
    fpt("evaluate", "--model", "outputs/knn/model", "--output", "outputs/knn/evaluation", cwd=study)
    fpt("train", "--method", "linear", "--output", "outputs/knn", cwd=study)
    out, _ = fpt("compare", "outputs/knn", "outputs/evaluation", "--json", cwd=study)
    found = json.loads(out)["models"]
    assert [row["train_seconds"] is None for row in found] == [True, False]
    assert found[0]["model"]["method"] == "knn"


def test_train_with_evaluate_gives_the_results_of_both_verbs(study: Path, fpt: Fpt) -> None:
    out, _ = fpt("train", "--method", "knn", "--output", "outputs/both", "--evaluate", "--json", cwd=study)
    assert json.loads(out)["metrics"] == json.loads((study / "outputs/both/evaluation/metrics.json").read_text())
    fpt("evaluate", "--model", "outputs/both/model", "--output", "outputs/after", cwd=study)
    for name in ("metrics.json", "predictions.parquet"):
        assert (study / "outputs/both/evaluation" / name).read_bytes() == (study / "outputs/after" / name).read_bytes()
    shown, err = fpt("train", "--method", "knn", "--output", "outputs/both", "--evaluate", cwd=study)
    assert "Labels (rows) and predictions (columns)" in shown + err
    assert "Report: " in shown + err


def test_predict_works_on_a_baseline(study: Path, fpt: Fpt, tmp_path: Path) -> None:
    images = draw_images(tmp_path / "new", per_class=1, seed=5)
    for method in ("statistics", "linear", "knn", "attentive"):
        fpt("train", "--method", method, "--output", f"outputs/{method}", cwd=study)
        out, _ = fpt("predict", "--model", f"outputs/{method}/model", images, cwd=study)
        lines = out.splitlines()
        assert len(lines) == 3
        assert all(line.endswith(",") for line in lines[1:]), "no errors"


def test_images_that_a_model_has_fitted_splits_are_named_as_such(study: Path, fpt: Fpt) -> None:
    for method, split, seen in (
        ("linear", "train", "the model was trained on these images"),
        ("linear", "val", "validation images were used to choose the epoch and the settings"),
        ("statistics", "val", "the model was trained on these images"),
        ("statistics", "test", None),
    ):
        fpt("train", "--method", method, "--output", f"outputs/{method}", cwd=study)
        words = ["--model", f"outputs/{method}/model", "--output", f"outputs/{method}/{split}", "--split", split]
        out, _ = fpt("evaluate", *words, cwd=study)
        report = (study / "outputs" / method / split / "report.html").read_text()
        metrics = json.loads((study / "outputs" / method / split / "metrics.json").read_text())
        if seen is None:
            assert "Warning" not in out + report
            assert "warnings" not in metrics
            continue
        assert out.splitlines()[0] == f"Warning: {seen}; this is not a test result."
        assert metrics["warnings"] == [f"{seen}; this is not a test result."]
        assert next(iter(metrics)) == "warnings"
        assert report.index(seen) < report.index("Headline")
        if split == "val":
            fpt("evaluate", *words[:2], "--split", "val", "--output", "outputs/twin", cwd=study)
            out, _ = fpt("compare", f"outputs/{method}/val", "outputs/twin", cwd=study)
            assert out.splitlines()[0] == f"Warning: {seen}; this is not a test result."


def test_other_splits_are_not_compared(study: Path, fpt: Fpt) -> None:
    fpt("evaluate", "--split", "val", "--output", "outputs/val", cwd=study)
    _, err = fpt("compare", "outputs/evaluation", "outputs/val", cwd=study, code=2)
    assert "cannot be compared" in err


def test_the_cost_of_a_fit_and_of_a_training_are_in_one_table(study: Path, fpt: Fpt) -> None:
    out, _ = fpt("cost", "--method", "knn", cwd=study)
    assert "no gradient" in out
    manifest = read_manifest(study / "outputs/manifest/manifest.parquet")
    rows = sum(row.split != "test" for row in manifest.rows)
    assert f"128 numbers per image, {rows} of training and validation" in out
    assert "PME" not in out
    cost = json.loads(fpt("cost", "--method", "linear", "--json", cwd=study)[0])
    assert (cost["learnable"], cost["train_tensor_mib"]) == (2 * 129, None)
    out, _ = fpt("cost", "--method", "fpt-x", cwd=study)
    assert "Linear probes read" in out
    assert "PME is the score times" in out
    out, _ = fpt("cost", "--method", "attentive", "--json", cwd=study)
    assert json.loads(out)["method"] == "attentive"
