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


def test_a_filter_leaves_out_files(study: Path) -> None:
    """Localizers and other modalities are named, and left out where the settings say so; so are lists of files."""
    for number, path in enumerate(sorted((study / "images").glob("series*/*"))):
        header = pydicom.dcmread(path)
        header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if number % 2 else "AXIAL"]
        header.Modality = "US" if number == 0 else "CT"
        header.save_as(path)
    notes = "\n".join(run(study)[1].notes)
    assert "Images of several modalities: 15 CT, 1 US. To use one: data.tag_filter: {Modality: [CT]}" in notes
    assert (
        'Warning: 8 images for planning a scan (localizers). To leave them out: data.tag_filter: {ImageType: ["!'
        in notes
    )
    chosen = {"Modality": "ct", "ImageType": ["!LOCALIZER"]}
    manifest, result = run(study, tag_filter=chosen)
    assert {int(row.path.split("/")[1][:2]) % 2 for row in manifest.rows} == {0} and len(manifest.rows) == 7
    assert "1 image left out, because Modality is US (data.tag_filter)." in result.notes
    assert not any("localizers" in note for note in result.notes)
    rows = [f"{path.relative_to(study / 'images')},{number % 4 // 2}" for number, path in
            enumerate(sorted((study / "images").glob("series*/*")))]  # fmt: skip
    (study / "labels.csv").write_text("\n".join(["path,label", *rows]))
    assert {row.path for row in run(study, labels="labels.csv", tag_filter=chosen)[0].rows} == {
        row.path for row in manifest.rows
    }
    with pytest.raises(DataError, match=r"data.tag_filter.Modalty: .*did you mean 'Modality'"):
        run(study, tag_filter={"Modalty": ["CT"]})


def test_files_without_a_patient_belong_to_their_study(study: Path) -> None:
    for path in sorted((study / "images").glob("series*/*")):
        header, patient = pydicom.dcmread(path), int(path.parent.name[-1])
        header.StudyInstanceUID = f"1.2.{patient}"
        if patient == 7 or (patient == 6 and path.name.startswith("12")):
            header.PatientID = ""
        header.save_as(path)
    manifest, result = run(study)
    group_of = {row.path.split("/")[1][:2]: row.group for row in manifest.rows}
    assert group_of["12"] == group_of["13"] == pseudonym("MRN-6", study_key(study / ".fpt"))
    assert group_of["14"] == group_of["15"] and len(set(group_of.values())) == result.groups == 8
    assert "3 images without PatientID: those of one examination (StudyInstanceUID) stay together." in result.notes


def test_one_patient_for_all_after_anonymisation(study: Path) -> None:
    for path in sorted((study / "images").glob("series*/*")):
        header = pydicom.dcmread(path)
        header.PatientID, header.StudyInstanceUID = "ANON", f"1.2.{path.parent.name[-1]}"
        header.save_as(path)
    with pytest.raises(DataError) as caught:
        run(study)
    assert "all files have the same PatientID, as after anonymisation" in caught.value.cause
    assert run(study, group_column="StudyInstanceUID")[1].groups == 8


def test_objects_without_a_picture_are_skipped_by_name(study: Path) -> None:
    """Segmentations and doses have pixels, but are results; objects of unknown classes may have none."""
    kinds = {
        "481.3": "DICOM without an image",
        "481.2": "DICOM segmentation, map or dose",
        "66.4": "DICOM segmentation, map or dose",
        "30": "DICOM segmentation, map or dose",
        "67": "DICOM without an image",
        "104.1": "DICOM without an image",
        "481.12": "DICOM without an image",
    }
    for uid in kinds:
        dataset(np.zeros((4, 4), np.uint8), sop=f"1.2.840.10008.5.1.4.1.1.{uid}").save_as(study / f"images/{uid}")
    private = dataset(np.zeros((4, 4), np.uint8), sop="1.3.46.670589.11.0.0.12.1")
    del private.PixelData, private.Rows, private.Columns
    private.save_as(study / "images/private")
    manifest, result = run(study)
    assert len(manifest.rows) == 16
    assert result.passed_over == {"DICOM segmentation, map or dose": 3, "DICOM without an image": 6}
    assert all(row.path.startswith("series") for row in manifest.rows)
