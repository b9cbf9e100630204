"""Images without a label, from `fpt prepare` to `fpt predict --unlabelled`."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import Fpt
from PIL import Image
from task_studies import GRADES, draw_grades, draw_labelled, write_labels

import fpt as front_door
from schemas.errors import SettingsError


def table_of(root: Path) -> list[dict[str, Any]]:
    with (root / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def study_of(root: Path, weights: Path, method: str, **data: Any) -> Path:
    params = {
        "method": method,
        "data": {"images": "images", "labels": "labels.csv", "group_column": "patient", **data},
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "shard_size": 8},
        "train": {"epochs": 1, "side_reduction": 2, "side_image_size": 32},
        "compute": {"device": "cpu", "threads": 1},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def add_unlabelled(root: Path, number: int, label: str) -> list[str]:
    """Noise under new names, at the end of the table."""
    rng = np.random.default_rng(5)
    rows = table_of(root)
    names = [f"new{at}.png" for at in range(number)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (64, 72)).astype(np.uint8)).save(root / "images" / name)
        rows.append({**dict.fromkeys(rows[0], ""), "path": name, "label": label, "patient": name})
    write_labels(root, rows)
    return names


def run_all(study: Path, fpt: Fpt) -> dict[str, Any]:
    for command in ("prepare", "extract", "train", "evaluate"):
        fpt(command, cwd=study)
    return dict(json.loads((study / "outputs/evaluation/metrics.json").read_text()))


CASES = {
    "ordinal": ("statistics", {"task": "ordinal", "classes": list(GRADES)}, ""),
    "multiclass": ("fpt+", {"task": "multiclass", "classes": list(GRADES)}, "NaN"),
    "multilabel": ("linear", {"task": "multilabel"}, "?"),
}


@pytest.mark.parametrize("task", list(CASES))
def test_cached_and_predicted_but_not_trained_on(tmp_path: Path, weights: Path, fpt: Fpt, task: str) -> None:
    """The model is that of the study without these images, bit by bit; the predictions are those of the files."""
    method, data, missing = CASES[task]
    plain = tmp_path / "plain"
    (draw_labelled if task == "multilabel" else draw_grades)(plain)
    with_more = Path(shutil.copytree(plain, tmp_path / "more"))
    names = add_unlabelled(with_more, 5, missing)
    _, err = fpt("prepare", cwd=study_of(with_more, weights, method, **data), code=2)
    assert "data.unlabelled: allow" in err
    study_of(with_more, weights, method, **data, unlabelled="allow")
    metrics = run_all(study_of(plain, weights, method, **data), fpt)
    assert run_all(with_more, fpt) == metrics
    receipts = [json.loads((one / "outputs/features/receipt.json").read_text()) for one in (plain, with_more)]
    assert [receipt["images"] for receipt in receipts] == [48, 53]
    for pattern in ("model/*.safetensors", "evaluation/predictions.parquet"):
        found = [sorted((one / "outputs").glob(pattern)) for one in (plain, with_more)]
        assert found[0] and [path.read_bytes() for path in found[0]] == [path.read_bytes() for path in found[1]]

    out, _ = fpt("predict", "--unlabelled", cwd=with_more)
    cached = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in cached] == names
    out, _ = fpt("predict", *(f"images/{name}" for name in names), cwd=with_more)
    for row, computed in zip(cached, csv.DictReader(io.StringIO(out)), strict=True):
        assert row["predicted"] == computed["predicted"]
        for column in row:
            if column.startswith("p_"):
                assert float(row[column]) == pytest.approx(float(computed[column]), abs=2e-3)
    if task == "ordinal":
        again = front_door.predict(front_door.open_study(with_more))
        assert [row.path for row in again] == names and again.predicted == [row["predicted"] for row in cached]
        with pytest.raises(SettingsError, match="no images of its own"):
            front_door.predict(with_more / "outputs/model")


def test_what_cannot_be_predicted(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    draw_grades(tmp_path / "study")
    study = study_of(tmp_path / "study", weights, "linear", task="ordinal", classes=list(GRADES))
    _, err = fpt("predict", cwd=study, code=2)
    assert "No images are named" in err
    _, err = fpt("predict", "images", "--unlabelled", cwd=study, code=2)
    assert "exclude each other" in err
    for command in ("prepare", "extract", "train"):
        fpt(command, cwd=study)
    _, err = fpt("predict", "--unlabelled", cwd=study, code=2)
    assert "no images without a label" in err and "data.unlabelled: allow" in err
