"""Labels and patients from DICOM headers; identifiers are stored as keyed hashes only."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import REPORT, dataset, save
from PIL import Image

from schemas.errors import DataError, FptError, SettingsError
from schemas.manifest import Manifest, PrepareResult
from schemas.parse import parse_settings
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.prepare.dataset_listing import read_listing
from stages.prepare.pseudonyms import pseudonym, study_key

PARTS = ("CHEST", "HAND")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Eight patients with two images each, half of them without a suffix, and a report without an image."""
    rng = np.random.default_rng(0)
    for number in range(16):
        patient = number // 2
        save(
            tmp_path / f"images/series{patient}/{number:02d}{'.dcm' if number % 2 else ''}",
            rng.integers(0, 4096, (20, 24)).astype(np.uint16),
            12,
            PatientID=f"MRN-{patient}",
            PatientName="Doe^Jane",
            BodyPartExamined=PARTS[patient % 2],
            Laterality="LR"[number % 2],
        )
    dataset(np.zeros((2, 2), np.uint8), sop=REPORT).save_as(tmp_path / "images/report.dcm")
    return tmp_path


def run(root: Path, **data: Any) -> tuple[Manifest, PrepareResult]:
    settings = parse_settings({"data": {"images": "images", "labels": "tags", **data}})
    result = prepare(settings.data, root, root / "outputs/manifest", history=root / ".fpt/splits")
    return read_manifest(root / "outputs/manifest/manifest.parquet"), result


def test_labels_and_patients_of_headers(study: Path) -> None:
    manifest, result = run(study)
    assert manifest.classes == PARTS and manifest.unit == "patients" and len(manifest.rows) == 16
    assert result.groups == 8 and result.passed_over == {"DICOM without an image": 1}
    for row in manifest.rows:
        patient = int(row.path.split("/")[0].removeprefix("series"))
        assert row.label == PARTS[patient % 2]
        assert row.group == pseudonym(f"MRN-{patient}", study_key(study / ".fpt"))
    splits = {(row.group, row.split) for row in manifest.rows}
    assert len(splits) == 8


def test_no_identifier_is_written(study: Path) -> None:
    run(study)
    written = [path for path in study.rglob("*") if path.is_file() and "images" not in path.parts]
    assert len(written) >= 4
    for path in written:
        content = path.read_bytes()
        assert b"MRN-" not in content and b"Doe" not in content, path


def test_the_key_is_private_and_stays(study: Path) -> None:
    first, _ = run(study)
    path = study / ".fpt/key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir() if file.name.startswith("key")] == ["key"]
    assert run(study)[0] == first
    path.unlink()
    assert {row.group for row in run(study)[0].rows}.isdisjoint(row.group for row in first.rows)
    path.write_text("short")
    with pytest.raises(DataError, match="is damaged"):
        run(study)


def test_a_check_writes_no_key(study: Path) -> None:
    settings = parse_settings({"data": {"images": "images", "labels": "tags"}})
    assert read_listing(settings.data, study).unit == "patients"
    assert not (study / ".fpt").exists()


def test_other_elements(study: Path) -> None:
    manifest, result = run(study, label_column="Laterality")
    assert manifest.classes == ("L", "R") and result.groups == 8
    manifest, result = run(study, group_column=None)
    assert result.groups == 0 and any("PatientID is not used" in note for note in result.notes)


def test_sites_and_further_elements(study: Path) -> None:
    for path in (study / "images").glob("series*/*"):
        header = pydicom.dcmread(path)
        header.InstitutionName = f"Site {int(path.parent.name[-1]) // 4}"
        header.save_as(path)
    manifest, _ = run(study, site_column="InstitutionName", keep_columns=["Laterality", "ViewPosition"])
    for row in manifest.rows:
        assert row.site == f"Site {int(row.path.split('/')[0][-1]) // 4}"
        assert row.kept == {"Laterality": "LR"[int(row.path.split("/")[1][:2]) % 2], "ViewPosition": ""}
    with pytest.raises(DataError, match="PatientBirthDate may identify a person"):
        run(study, keep_columns=["PatientBirthDate"])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("PatientName", "may identify a person"),
        ("AccessionNumber", "may identify a person"),
        ("BodyPartExamind", "did you mean 'BodyPartExamined'"),
        ("PixelData", "is not a short text"),
    ],
)
def test_elements_that_are_refused(study: Path, column: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(study, label_column=column)


@pytest.mark.parametrize("labels", [None, "labels.csv"])
def test_patients_of_dicom_files_with_other_labels(study: Path, labels: str | None) -> None:
    """Class folders and tables without a patient column: PatientID is used, unless the settings say otherwise."""
    (study / "images/report.dcm").unlink()
    rows = ["path,label"]
    for number, folder in enumerate(sorted((study / "images").iterdir())):
        for file in sorted(folder.iterdir()):
            place = study / "images" / PARTS[number % 2] / f"{folder.name}-{file.name}"
            place.parent.mkdir(exist_ok=True)
            file.rename(place)
            rows.append(f"{place.relative_to(study / 'images')},{PARTS[number % 2]}")
        folder.rmdir()
    (study / "labels.csv").write_text("\n".join(rows))
    manifest, result = run(study, labels=labels)
    assert (manifest.unit, result.groups, result.group_column) == ("patients", 8, "tags")
    assert any("16 DICOM files with a PatientID" in note for note in result.notes)
    assert len({(row.group, row.split) for row in manifest.rows}) == 8
    assert run(study, labels=labels, group_column=None)[1].groups == 0
    if labels is None:
        assert run(study, labels=None, group_column="tags")[0] == manifest


def test_images_without_a_label(study: Path) -> None:
    save(study / "images/unknown", np.ones((20, 20), np.uint8))
    Image.new("RGB", (20, 20)).save(study / "images/photo.png")
    with pytest.raises(FptError) as error:
        run(study)
    text = str(error.value)
    assert "2 images without a label in the header" in text and "Name another element with data.label_column" in text
    assert "photo.png: is not a DICOM file" in text
    assert "unknown: its header has no BodyPartExamined" in text
    manifest, result = run(study, on_error="quarantine")
    assert len(manifest.rows) == 16 and result.quarantined == 2
    assert "its header has no BodyPartExamined" in (study / "outputs/manifest/quarantine.csv").read_text()


def test_settings_that_need_a_table() -> None:
    for keys in ({"split_column": "SeriesDescription"}, {"label_columns": ["a"], "task": "multilabel"}):
        with pytest.raises(SettingsError, match="need a labels table"):
            parse_settings({"data": {"labels": "tags", **keys}})
