"""The verbs on a finished study: what is result, what is talk, and which options win."""

import csv
import html
import io
import json
import shutil
from pathlib import Path

import pytest
from command_line import Fpt
from PIL import Image

# The first test here waits for the whole pipeline, which a loaded machine runs in minutes.
pytestmark = pytest.mark.timeout(600)


def test_prepare_prints_the_splits(study: Path, fpt: Fpt) -> None:
    out, err = fpt("prepare", cwd=study)
    assert "40 images" in out
    assert "Next: fpt extract" in err
    out, _ = fpt("prepare", "--json", cwd=study)
    assert json.loads(out)["counts"]["test"] == {"bright": 4, "dark": 4}


def test_the_next_command_is_not_said_inside_of_dvc(study: Path, fpt: Fpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "extract")
    assert "Next" not in fpt("extract", cwd=study)[1]


def test_plan_computes_nothing(study: Path, fpt: Fpt) -> None:
    out, _ = fpt("extract", "--plan", "--json", "--set", "features.ratio=0.5", cwd=study)
    plan = json.loads(out)
    assert (plan["images"], plan["cached"], plan["to_compute"]) == (40, 0, 40)
    assert plan["bytes"] == 40 * plan["bytes_per_image"]
    assert not Path(plan["store"]).exists()
    out, _ = fpt("extract", "--plan", cwd=study)
    assert "Free disk" in out
    for dtype, count in plan["cache_bytes_by_dtype"].items():
        assert dtype in out
        assert count > 0
    assert "int8 (chosen)" in out
    assert "none" in out


def test_extract_counts_what_the_cache_had(study: Path, fpt: Fpt) -> None:
    out, _ = fpt("extract", "--json", cwd=study)
    report = json.loads(out)
    assert (report["images"], report["cached"], report["computed"]) == (40, 40, 0)
    out, err = fpt("extract", cwd=study)
    assert out == ""
    assert "computed 0." in err


def test_extract_check_mends_a_flipped_byte(study: Path, fpt: Fpt) -> None:
    shard = next((study / ".fpt" / "cache").rglob("keys/c.3.*"))
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    _, err = fpt("extract", "--check", cwd=study)
    assert "1 damaged shard" in err
    assert "36 were in the cache, computed 4 " in err


def test_train_logs_every_epoch_and_writes_its_settings(study: Path, fpt: Fpt) -> None:
    out, err = fpt("train", "--set", "train.epochs=3", "--json", cwd=study)
    assert [line.split()[1] for line in err.splitlines() if line.startswith("Epoch")] == ["1/3", "2/3", "3/3"]
    assert len(json.loads(out)["epochs"]) == 3
    metrics = json.loads((study / "outputs" / "train" / "metrics.json").read_text())
    assert metrics["step"] == 3
    assert metrics["best"]["epoch"] in (1, 2, 3)
    lines = (study / "outputs" / "train" / "plots" / "metrics" / "val" / "auc.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["step", "1", "2", "3"]
    assert "epochs: 3" in (study / "outputs" / "model" / "settings.yaml").read_text()


def test_a_training_that_cannot_start_keeps_the_last_metrics(study: Path, fpt: Fpt) -> None:
    before = (study / "outputs" / "train" / "metrics.json").read_text()
    _, err = fpt("train", "--set", "features.ratio=0.5", cwd=study, code=2)
    assert "kept" in err
    assert (study / "outputs" / "train" / "metrics.json").read_text() == before


def test_method_and_output_train_a_second_model_beside_the_first(study: Path, fpt: Fpt) -> None:
    first = (study / "outputs" / "model" / "model.safetensors").read_bytes()
    fpt("train", "--method", "side", "--output", "outputs/baseline", cwd=study)
    words = ["--model", "outputs/baseline/model", "--output", "outputs/baseline/evaluation", "--split", "val"]
    out, _ = fpt("evaluate", *words, "--json", cwd=study)
    assert json.loads(out)["split"] == "val"
    assert (study / "outputs" / "model" / "model.safetensors").read_bytes() == first
    written = {path.name for path in (study / "outputs" / "baseline").iterdir()}
    assert written == {"model", "train", "evaluation"}
    assert "method: side" in (study / "outputs" / "baseline" / "evaluation" / "settings.yaml").read_text()


def test_train_and_report_tell_what_the_side_networks_add(study: Path, fpt: Fpt) -> None:
    _, err = fpt("train", "--method", "fpt-x", "--output", "outputs/x", cwd=study)
    (line,) = (line for line in err.splitlines() if "of at most 3: held-out log-loss" in line)
    assert line.startswith("1 side network of at most 3: ")
    assert line.endswith("No clear gain: `--method statistics` gives the same without training.")
    fpt("evaluate", "--model", "outputs/x/model", "--output", "outputs/x/evaluation", cwd=study)
    report = (study / "outputs" / "x" / "evaluation" / "report.html").read_text()
    assert line in html.unescape(report)


def test_evaluate_shows_a_table_and_where_the_report_is(study: Path, fpt: Fpt) -> None:
    out, err = fpt("evaluate", cwd=study)
    assert all(word in out for word in ("AUC", "Balanced accuracy", "Cohen's kappa", "bright", "dark"))
    assert str(study / "outputs" / "evaluation" / "report.html") in err


def test_predict_writes_a_row_an_image_and_lists_the_broken(study: Path, finished: Path, fpt: Fpt) -> None:
    (study / "broken.png").write_text("no image")
    words = ["predict", finished / "images" / "dark", study / "broken.png", "--output", "new.csv"]
    out, err = fpt(*words, cwd=study, code=2)
    assert out == ""
    assert "1 image cannot be used" in err
    assert "20 of 21 images predicted" in err
    rows = list(csv.DictReader((study / "new.csv").open()))
    assert [row["predicted"] for row in rows] == ["dark"] * 20 + [""]
    assert rows[-1]["error"]


def test_predict_needs_no_study(study: Path, finished: Path, weights: Path, tmp_path: Path, fpt: Fpt) -> None:
    model = Path(shutil.move(study / "outputs" / "model", tmp_path / "model"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    image = finished / "images" / "bright" / "000.png"
    words = ["predict", image, "--model", model, "--set", f"lpm.weights={weights}"]
    out, _ = fpt(*words, cwd=elsewhere)
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["predicted"] == "bright"


def test_predict_refuses_a_folder_without_images(study: Path, tmp_path: Path, fpt: Fpt) -> None:
    (tmp_path / "empty").mkdir()
    _, err = fpt("predict", tmp_path / "empty", cwd=study, code=2)
    assert "has no images" in err


def test_the_prediction_of_a_cached_image_is_the_evaluated_one(study: Path, finished: Path, fpt: Fpt) -> None:
    from stages.evaluate.predictions import read_predictions

    judged = read_predictions(study / "outputs" / "evaluation" / "predictions.parquet")
    image = finished / "images" / judged.rows[0].path
    assert Image.open(image).size == (80, 72)
    out, _ = fpt("predict", image, cwd=study)
    (row,) = csv.DictReader(io.StringIO(out))
    shown = [float(row[f"p_{name}"]) for name in judged.classes]
    assert shown == pytest.approx(judged.probabilities[0].tolist(), abs=2e-3)


COST_KEYS = {
    "learnable",
    "learnable_share",
    "train_tensor_mib",
    "full_finetune_tensor_mib",
    "cache_bytes_per_image",
}


def test_cost_in_a_study_knows_its_classes_and_obeys_options(study: Path, fpt: Fpt) -> None:
    out, _ = fpt("cost", "--json", cwd=study)
    report = json.loads(out)
    assert report.keys() >= COST_KEYS
    assert (report["lpm"], report["classes"], report["batch_size"]) == ("test_vit.r160_in1k", 2, 16)
    out, _ = fpt("cost", "--json", "--classes", 7, "--batch-size", 4, "--dtype", "float32", cwd=study)
    other = json.loads(out)
    assert (other["classes"], other["batch_size"], other["dtype"]) == (7, 4, "float32")
    assert other["cache_bytes_per_image"] > report["cache_bytes_per_image"]
    out, _ = fpt("cost", cwd=study)
    assert f"{report['learnable']:,}" in out
    for dtype, count in report["cache_bytes_by_dtype"].items():
        assert dtype in out
        assert f"{count:,}" in out


@pytest.mark.slow
def test_cost_outside_of_a_study_from_flags_alone(tmp_path: Path, fpt: Fpt) -> None:
    words = "--lpm vit_base_patch16_384 --image-size 512 --method fpt+ --dtype float16 --batch-size 16 --classes 5"
    out, _ = fpt("cost", "--json", *words.split(), cwd=tmp_path)
    assert json.loads(out)["learnable"] == 900_965


def test_demo_summary_prints_both_areas(study: Path, fpt: Fpt) -> None:
    _, err = fpt("demo", "summary", cwd=study, code=2)
    assert "`dvc repro`" in err and "`fpt demo run`" in err
    shutil.copytree(study / "outputs" / "evaluation", study / "outputs" / "baseline" / "evaluation")
    out, err = fpt("demo", "summary", cwd=study)
    assert out.count("1.000") == 2
    assert "report.html" in err


def test_a_folder_is_the_lpm_from_extraction_to_prediction(
    study: Path, finished: Path, weights: Path, fpt: Fpt
) -> None:
    image = finished / "images" / "bright" / "003.png"
    (named,) = csv.DictReader(io.StringIO(fpt("predict", image, cwd=study)[0]))
    (study / "lpm").mkdir()
    shutil.copy(weights, study / "lpm" / "model.safetensors")
    # The preprocessing of test_vit: the same model under another name gives the same prediction.
    same = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (study / "lpm" / "config.json").write_text(json.dumps(same))
    words = ["--set", "lpm.name=local-dir:lpm", "--set", "lpm.weights=hub"]
    fpt("extract", *words, cwd=study)
    fpt("train", *words, cwd=study)
    (row,) = csv.DictReader(io.StringIO(fpt("predict", image, *words, cwd=study)[0]))
    assert row["predicted"] == named["predicted"] == "bright"
    assert float(row["p_bright"]) == pytest.approx(float(named["p_bright"]), abs=1e-3)
    _, err = fpt("predict", image, cwd=study, code=2)
    assert "Set lpm.name to the local-dir: of that model" in err
