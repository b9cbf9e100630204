"""A study of DICOM files from `fpt init` to the report and to predictions, on the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import Fpt
from dicom_files import CR, CT, ULTRASOUND, save, save_compressed
from study_tools import Run

from pipeline.params import load_settings
from pipeline.project import private_folder
from stages.data_check.check import read_data
from stages.manifest import read_manifest
from stages.prepare.pseudonyms import pseudonym, study_key

PARTS = ("CHEST", "HAND")


def draw(folder: Path, patients: int = 24) -> None:
    """Two classes that differ in their pattern, in four kinds of files; one image per patient."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:72]
    for patient in range(patients):
        part = PARTS[patient % 2]
        pattern = (x // 8 % 2 if part == "CHEST" else y // 8 % 2) * 800 + rng.integers(0, 300, x.shape)
        tags = {"PatientID": f"MRN{patient}", "PatientName": "Doe^Jane", "BodyPartExamined": part}
        kind, name = patient // 2 % 4, f"S{patient:02d}"
        if kind == 0:
            inverted = (4095 - pattern).astype(np.uint16)
            save(folder / f"{name}.dcm", inverted, 12, CR, PhotometricInterpretation="MONOCHROME1", Modality="CR",
                 WindowCenter=3500, WindowWidth=1200, **tags)  # fmt: skip
        elif kind == 1:
            hounsfield = (pattern - 1000).astype(np.int16)
            save(folder / name, hounsfield, 16, CT, RescaleSlope=1, RescaleIntercept=0, PixelPaddingValue=-2000, **tags)
        elif kind == 2:
            grey = (pattern // 5).astype(np.uint8)
            save(folder / f"{name}.dcm", np.stack([grey] * 3, axis=-1), 8, ULTRASOUND, Modality="US", **tags)
        else:
            save_compressed(folder / f"{name}.dicom", pattern.astype(np.uint16), **tags)


@pytest.mark.dvc
def test_from_headers_to_a_report(tmp_path: Path, weights: Path, run: Run, fpt: Fpt) -> None:
    draw(tmp_path / "images")
    words = ["method=statistics", "lpm.name=test_vit", f"lpm.weights={weights}", "features.image_size=64",
             "features.tokens=false", "features.shard_size=8", "compute.device=cpu"]  # fmt: skip
    options = [word for setting in words for word in ("--set", setting)]
    made = run(["fpt", "init", "study", "--images", "images", "--labels", "tags", *options], cwd=tmp_path)
    assert "The label of each image is BodyPartExamined" in made.stdout + made.stderr
    study = tmp_path / "study"
    assert not (study / ".fpt").exists()
    assert "${data.labels}\n" not in (study / "dvc.yaml").read_text().replace("# - ${data.labels}", "")
    assert yaml.safe_load((study / "params.yaml").read_text())["data"]["labels"] == "tags"

    out, err = fpt("prepare", cwd=study)
    assert out.startswith("24 images of 24 patients")
    assert "6 images of ultrasound: they may show names or dates" in err
    assert "DVC does not watch" not in err
    for command in ("extract", "train", "evaluate"):
        fpt(command, cwd=study)
    assert json.loads((study / "outputs/evaluation/metrics.json").read_text())["auc"] > 0.9
    assert (study / "outputs/evaluation/report.html").stat().st_size > 10_000

    manifest = read_manifest(study / "outputs/manifest/manifest.parquet")
    found = {row["path"]: row["predicted"] for row in csv.DictReader(io.StringIO(fpt("predict", tmp_path / "images",
             cwd=study)[0]))}  # fmt: skip
    right = sum(found[str(tmp_path / "images" / row.path)] == row.label for row in manifest.rows)
    assert len(found) == 24 and right >= 20
    tracked = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=study).stdout
    assert ".fpt" not in tracked
    for path in study.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"MRN1" not in content and b"Doe^" not in content, path


def test_another_window_is_another_store(tmp_path: Path, weights: Path, fpt: Fpt) -> None:
    draw(tmp_path / "images", 16)
    raw = {
        "method": "linear",
        "data": {"images": "images", "labels": "tags"},
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "tokens": False, "statistics": False},
        "compute": {"device": "cpu"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    fpt("prepare", cwd=tmp_path)
    prints = set()
    for window in ("stored", "percentile", "[500, 1000]"):
        fpt("extract", "--set", f"features.window={window}", cwd=tmp_path)
        receipt = json.loads((tmp_path / "outputs/features/receipt.json").read_text())
        prints.add(receipt["fingerprint"])
        assert receipt["images"] == 16
    assert len(prints) == 3


def test_pseudonyms_of_a_check_are_those_of_the_study(tmp_path: Path, fpt: Fpt) -> None:
    """Two checks print the same, before and after `fpt prepare`; the key is in the study."""
    draw(tmp_path / "images", 16)
    study = tmp_path / "study"
    study.mkdir()
    raw = {"data": {"images": "../images", "labels": "tags"}, "features": {"image_size": 64}}
    (study / "params.yaml").write_text(yaml.safe_dump(raw))
    first, _ = fpt("data", "check", "--json", cwd=study)
    key = (study / ".fpt/key").read_bytes()
    assert fpt("data", "check", "--json", cwd=study)[0] == first
    read = [
        read_data(load_settings(study / "params.yaml", []).data, study, private=private_folder(study)).listing.items
        for _ in range(2)
    ]
    assert read[0] == read[1]
    assert {item.group for item in read[0]} == {pseudonym(f"MRN{n}", study_key(study / ".fpt")) for n in range(16)}
    assert (study / ".fpt/key").read_bytes() == key
    assert private_folder(tmp_path) is None, "a folder that is no study gets no key"


def test_init_names_options_for_what_it_refuses(tmp_path: Path, fpt: Fpt) -> None:
    """A table of patients without paths, and headers without a label: each message ends in what to type."""
    draw(tmp_path / "images", 16)
    save(tmp_path / "images/plain", np.ones((20, 20), np.uint8), PatientID="MRN3")
    rows = [f"MRN{number},{'ab'[number % 2]}" for number in range(16)]
    (tmp_path / "labels.csv").write_text("\n".join(["Patient ID,Diagnosis", *rows]))
    words = ("init", "study", "--images", "images")
    _, err = fpt(*words, "--labels", "tags", cwd=tmp_path, code=2)
    assert "1 image without a label" in err and "plain: its header has no BodyPartExamined" in err
    assert "--set data.on_error=quarantine" in err and "--set data.unlabelled=allow" in err
    table = ("--labels", "labels.csv", "--label-column", "Diagnosis")
    _, err = fpt(*words, *table, cwd=tmp_path, code=2)
    option = "data.tag_columns={PatientID: Patient ID}"
    assert f"--set '{option}'" in err
    assert not (tmp_path / "study").exists()
    raw = {"images": "images", "labels": "labels.csv", "label_column": "Diagnosis"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"data": raw, "lpm": {"name": "test_vit"}}))
    _, err = fpt("prepare", "--set", option, "--set", "features.precision=float32", cwd=tmp_path)
    assert "17 DICOM files match 16 rows of labels.csv by PatientID." in err
    assert len(read_manifest(tmp_path / "outputs/manifest/manifest.parquet").rows) == 17
