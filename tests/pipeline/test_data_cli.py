"""`fpt data check` and `fpt data repair` on the command line."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from pictures import picture, recompressed, save


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of 31 images, without weights; one is a near-duplicate in another split."""
    rows = []
    for number in range(30):
        save(picture(number), tmp_path / f"images/{number:02}.png")
        split = ("train", "train", "val", "test")[number // 2 % 4]
        rows.append([f"{number:02}.png", "ab"[number % 2], split])
    save(recompressed(picture(6)), tmp_path / "images/near.png")
    rows.append(["near.png", "a", "train"])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    settings = {"data": {"images": "images", "labels": "labels.csv"}, "features": {"image_size": 64}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_check_prints_and_writes_a_page(study: Path, fpt: Fpt) -> None:
    out, err = fpt("data", "check", cwd=study)
    assert "31 images, 2 classes" in out and "1 leak between splits" in out
    assert "06.png (test), near.png (train)" in out
    page = study / "outputs/data_check.html"
    assert str(page) in err and "near.png" in page.read_text() and "<img" in page.read_text()
    fpt("data", "check", "--no-pixels", "--output", "bare.html", cwd=study)
    assert "<img" not in (study / "bare.html").read_text()
    written = {file.name for file in study.iterdir()} - {".fpt"}
    assert written == {"bare.html", "images", "labels.csv", "outputs", "params.yaml"}
    out, _ = fpt("data", "check", "--json", cwd=study)
    assert json.loads(out)["images"] == 31


def test_repair_then_prepare(study: Path, weights: Path, fpt: Fpt) -> None:
    lpm = (f"--set=lpm.weights={weights}", "--set=lpm.name=test_vit", "--set=features.precision=float32")
    _, err = fpt("prepare", *lpm, cwd=study, code=2)
    assert "1 leak" in err and "fpt data repair" in err
    out, err = fpt("data", "repair", cwd=study)
    assert "1 image left out of train (kept in test)." in out
    assert "labels.repaired.csv" in err and (study / "labels.repaired.report.csv").exists()
    fpt("prepare", *lpm, "--set", "data.labels=labels.repaired.csv", cwd=study)
    _, err = fpt("data", "repair", cwd=study, code=2)
    assert "exists already" in err
    out, _ = fpt("data", "repair", "--set=data.labels=labels.repaired.csv", "--output=again.csv", cwd=study)
    assert "No leaks" in out and not (study / "again.csv").exists()
