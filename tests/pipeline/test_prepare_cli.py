"""`fpt prepare` on the command line: output, the table of splits, and a failed run under DVC."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from study_tools import Run, draw_images


def small(tmp_path: Path, weights: Path, **data: object) -> Path:
    """A study of 40 images, without Git and DVC."""
    study = tmp_path / "study"
    draw_images(study / "images")
    raw = {
        "data": {"images": "images", **data},
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "precision": "float32"},
    }
    (study / "params.yaml").write_text(yaml.safe_dump(raw))
    return study


def write_table(study: Path, name: str = "labels.csv", **cells: str) -> None:
    rows = [
        {
            "path": f"{path.parent.name}/{path.name}",
            "label": path.parent.name,
            "patient_id": f"{path.parent.name}{n // 2}",
        }
        for n, path in enumerate(sorted((study / "images").rglob("*.png")))
    ]
    with (study / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_patients_are_found_and_called_so(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    study = small(tmp_path, weights, labels="labels.csv")
    write_table(study)
    out, err = fpt("prepare", cwd=study)
    assert out.startswith("40 images of 20 patients, 0 duplicates")
    assert "Column 'patient_id' of labels.csv has the patient" in err
    assert "kept their split" not in err
    resolved = yaml.safe_load((study / "outputs/manifest/settings.yaml").read_text())
    assert (resolved["data"]["group_column"], resolved["data"]["split_column"]) == ("patient_id", None)
    out, err = fpt("prepare", "--set", "data.group_column=null", cwd=study)
    assert out.startswith("40 images, 0 duplicates")
    assert "Column 'patient_id' of labels.csv is not used" in err


def test_changes_of_the_splits_are_printed(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    study = small(tmp_path, weights)
    fpt("prepare", cwd=study)
    shutil.rmtree(study / "outputs")
    draw_images(study / "images", per_class=1, seed=9, prefix="new")
    _, err = fpt("prepare", cwd=study)
    assert "40 images kept their split, none changed it, 2 new." in err
    write_table(study)
    _, err = fpt("prepare", "--set", "data.labels=labels.csv", cwd=study)
    assert "changed it (" in err and "test -> train" in err
    out, _ = fpt("prepare", "--redraw", "--json", cwd=study)
    result = json.loads(out)
    assert sum(result["moved"].values()) > 0 and result["known"] == 42


def test_the_splits_as_a_table(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    study = small(tmp_path, weights)
    before, err = fpt("prepare", "--write-split", "splits.csv", cwd=study)
    assert "data.labels" in err
    assert (study / "splits.csv").read_text().startswith("path,label,patient,split\nbright/000.png,bright,,")
    _, err = fpt("prepare", "--write-split", "splits.csv", cwd=study, code=2)
    assert "exists already" in err
    shutil.rmtree(study / ".fpt")
    after, err = fpt("prepare", "--set", "data.labels=splits.csv", cwd=study)
    assert after == before
    assert "Column 'split' of splits.csv" in err


def test_verbs_fall_back_to_the_copy_of_the_manifest(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    study = small(tmp_path, weights)
    fpt("prepare", cwd=study)
    shutil.rmtree(study / "outputs")
    out, err = fpt("extract", "--plan", "--json", cwd=study)
    assert json.loads(out)["images"] == 40
    assert err.count("taking the copy") == 1
    _, err = fpt("extract", "--plan", "--set", "data.seed=1", cwd=study, code=2)
    assert "There is no manifest" in err, "another draw has other splits"


def test_a_manifest_of_an_earlier_version_is_kept_to(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    study = small(tmp_path, weights)
    fpt("prepare", cwd=study)
    shutil.rmtree(study / ".fpt")
    draw_images(study / "images", per_class=1, seed=9, prefix="new")
    _, err = fpt("prepare", cwd=study)
    assert "40 images kept their split, none changed it, 2 new." in err
    shutil.rmtree(study / ".fpt")
    _, err = fpt("prepare", "--set", "data.seed=1", cwd=study)
    assert "none changed it" not in err, "another draw"
    assert "changed it (" in err


@pytest.mark.dvc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_experiment_that_failed_costs_nothing(study: Path, run: Run) -> None:
    run(["dvc", "exp", "run", "--name", "try", "-S", "data.images=nowhere"], cwd=study, code=255)
    run(["git", "checkout", "params.yaml"], cwd=study)
    assert not (study / "outputs/manifest/manifest.parquet").exists(), "DVC deletes it before it runs the stage"
    done = run(["fpt", "train"], cwd=study)
    assert "taking the copy" in done.stderr
