"""Several labels an image, and grades, by the commands that a user types."""

import csv
import io
import json
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from task_studies import GRADES, LABELS, draw_grades, draw_labelled

pytestmark = pytest.mark.timeout(600)


def make(root: Path, weights: Path, task: str) -> Path:
    (draw_grades if task == "ordinal" else draw_labelled)(root)
    data = {"task": task, "images": "images", "labels": "labels.csv", "group_column": "patient"}
    params = {
        "method": "linear",
        "data": data | ({"classes": list(GRADES)} if task == "ordinal" else {}),
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "shard_size": 8},
        "train": {"epochs": 2, "side_reduction": 2, "side_image_size": 32},
        "compute": {"device": "cpu", "threads": 1},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_from_a_table_to_a_comparison(tmp_path: Path, weights: Path, fpt: Fpt, task: str) -> None:
    study = make(tmp_path, weights, task)
    out, _ = fpt("prepare", cwd=study)
    total = next(line for line in out.splitlines() if line.startswith("│ all"))
    assert sum(int(cell) for cell in total.split("│")[2:5]) == 48, "each image once, whatever its labels"
    fpt("extract", cwd=study)
    fpt("train", cwd=study)
    out, _ = fpt("evaluate", cwd=study)
    lines = [line.strip() for line in out.splitlines()]
    if task == "ordinal":
        assert lines[1].startswith("Quadratic kappa")
    else:
        assert lines[1].startswith("AUC")
        for said in ("Exact match", "Hamming loss", "F1, micro", "false positives"):
            assert said in out
        assert "kappa" not in out
    fpt("train", "--method", "knn", "--output", "outputs/knn", cwd=study)
    fpt("evaluate", "--model", "outputs/knn/model", "--output", "outputs/knn/evaluation", cwd=study)
    out, _ = fpt("compare", "outputs/evaluation", "outputs/knn", cwd=study)
    assert "Difference to outputs/evaluation" in out
    assert ("quadratic kappa" in out, "exact match" in out) == (task == "ordinal", task == "multilabel")
    out, _ = fpt("predict", "images/000.png", "images/014.png", cwd=study)
    rows = list(csv.DictReader(io.StringIO(out)))
    names = GRADES if task == "ordinal" else LABELS
    for row in rows:
        p = {name: float(row[f"p_{name}"]) for name in names}
        if task == "multilabel":
            assert row["predicted"] == "|".join(name for name in names if p[name] >= 0.5)
        else:
            assert row["predicted"] in names
            assert sum(p.values()) == pytest.approx(1, abs=1e-4)
    assert json.loads((study / "outputs/evaluation/metrics.json").read_text())["task"] == task
    # The task and its classes are those of the model, also where no settings are.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = ["--model", study / "outputs/model", "--images", study / "images", "--labels", study / "labels.csv"]
    columns = [] if task == "ordinal" else ["--set", f"data.label_columns=[{','.join(LABELS)}]"]
    lpm = ["--set", f"lpm.weights={weights}", "--set", "data.group_column=patient"]
    out, _ = fpt("evaluate", *words, *columns, *lpm, "--json", cwd=elsewhere)
    metrics = json.loads(out)
    assert (metrics["task"], metrics["images"], metrics["split"]) == (task, 48, "external")
    assert "the model was trained on" in metrics["warnings"][0]
    assert (elsewhere / "outputs/external/images/report.html").exists()
    if task == "multilabel":
        few = ["--set", f"data.label_columns=[{','.join(LABELS[:2])}]"]
        _, err = fpt("evaluate", *words, *few, *lpm, cwd=elsewhere, code=2)
        assert f"'{LABELS[2]}'" in err


def test_a_changed_task_is_refused_until_it_is_prepared(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    study = make(tmp_path, weights, "ordinal")
    for command in ("prepare", "extract", "train"):
        fpt(command, cwd=study)
    other = ("--set", "data.task=multiclass")
    _, err = fpt("train", *other, cwd=study, code=2)
    assert "prepared for ordinal" in err
    assert "fpt prepare" in err
    _, err = fpt("predict", "images/000.png", *other, cwd=study, code=2)
    assert "trained for ordinal" in err
    fpt("prepare", *other, cwd=study)
    _, err = fpt("evaluate", *other, cwd=study, code=2)
    assert "fpt train" in err
    fpt("train", *other, cwd=study)
    out, _ = fpt("evaluate", *other, cwd=study)
    assert out.splitlines()[1].strip().startswith("AUC")
