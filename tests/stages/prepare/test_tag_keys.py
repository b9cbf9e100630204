"""Tables that name DICOM files by elements of their headers: a row per file, series, study, patient or side."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import REPORT, dataset, save
from pydicom.uid import generate_uid

from schemas.errors import DataError, SettingsError
from schemas.manifest import Manifest, PrepareResult
from schemas.parse import parse_settings
from stages.data_check.check import read_data
from stages.data_check.repair import plan_repair
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.prepare.dataset_listing import check_listing, read_listing
from stages.prepare.pseudonyms import pseudonym, study_key

PATIENTS, IMAGES = 8, 3


def uid(*parts: object) -> str:
    return str(generate_uid(entropy_srcs=[str(part) for part in parts]))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Eight patients with three images each in nested folders, without suffixes; a report and a text between them."""
    rng = np.random.default_rng(0)
    for patient in range(PATIENTS):
        for image in range(IMAGES):
            save(
                tmp_path / f"images/DICOM/PA{patient:02}/ST0/SE{image % 2}/IM{image}",
                rng.integers(0, 4096, (20, 24)).astype(np.uint16),
                12,
                PatientID=f"00{patient}4711",
                PatientName="Doe^Jane",
                StudyInstanceUID=uid("study", patient),
                SeriesInstanceUID=uid("series", patient, image % 2),
                SOPInstanceUID=uid(patient, image),
                Laterality="LR"[image % 2],
                AccessionNumber=f"ACC-{patient}",
            )
    dataset(np.zeros((2, 2), np.uint8), sop=REPORT).save_as(tmp_path / "images/DICOM/SR0")
    (tmp_path / "images/readme.txt").write_text("exported")
    return tmp_path


def table(root: Path, header: list[str], rows: list[list[str]]) -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def settings_of(**data: Any) -> Any:
    return parse_settings({"data": {"images": "images", "labels": "labels.csv", **data}}).data


def run(root: Path, **data: Any) -> tuple[Manifest, PrepareResult]:
    result = prepare(settings_of(**data), root, root / "outputs/manifest", history=root / ".fpt/splits")
    return read_manifest(root / "outputs/manifest/manifest.parquet"), result


def test_a_row_per_file(study: Path) -> None:
    rows = [[uid(n, image), "ab"[n % 2], f"{n}-{image}"] for n in range(PATIENTS) for image in range(IMAGES)]
    table(study, ["uid", "label", "note"], rows)
    manifest, result = run(study, tag_columns={"SOPInstanceUID": "uid"}, keep_columns=["note"])
    assert len(manifest.rows) == 24 and result.passed_over == {"DICOM without an image": 1, ".txt": 1}
    for row in manifest.rows:
        patient, image = int(row.path.split("/")[1][2:]), int(row.path[-1])
        assert (row.label, row.kept["note"]) == ("ab"[patient % 2], f"{patient}-{image}")
        assert row.group == pseudonym(f"00{patient}4711", study_key(study / ".fpt"))
    assert "24 DICOM files match 24 rows of labels.csv by SOPInstanceUID." in result.notes


@pytest.mark.parametrize(
    ("element", "value"),
    [
        ("PatientID", lambda patient: f"00{patient}4711"),
        ("StudyInstanceUID", lambda patient: uid("study", patient)),
        ("AccessionNumber", lambda patient: f"ACC-{patient}"),
    ],
)
def test_a_row_per_patient_or_study(study: Path, element: str, value: Any) -> None:
    rows = [
        [f" {value(patient)} ", "ab"[patient % 2], ("train", "val", "test")[patient // 2 % 3]] for patient in range(6)
    ]
    table(study, [element, "label", "split"], rows)
    manifest, result = run(study, tag_columns={element: element})
    assert len(manifest.rows) == 18
    assert {row.split for row in manifest.rows if "/PA02/" in row.path} == {"val"}
    assert [note for note in result.notes if "left out" in note] == [
        f"6 images left out, because no row of labels.csv has their {element}: DICOM/PA06/ST0/SE0/IM0, "
        "DICOM/PA06/ST0/SE0/IM2, DICOM/PA06/ST0/SE1/IM1, ..."
    ]
    for path in (study / "outputs").rglob("*"):
        assert not path.is_file() or value(1).encode() not in path.read_bytes(), "identifiers are not stored"


def test_a_row_per_side(study: Path) -> None:
    table(study, ["ID1", "LeftRight", "label"], [[f"00{n}4711", side, side] for n in range(PATIENTS) for side in "LR"])
    manifest, _ = run(study, tag_columns={"PatientID": "ID1", "Laterality": "LeftRight"})
    assert len(manifest.rows) == 24
    assert {row.label for row in manifest.rows if row.path.endswith("IM1")} == {"R"}
    assert {row.label for row in manifest.rows if not row.path.endswith("IM1")} == {"L"}


def test_rows_without_files(study: Path) -> None:
    """Spreadsheets make 1 of 001."""
    table(
        study,
        ["PatientID", "label"],
        [[f"00{patient}4711", "ab"[patient % 2]] for patient in range(7)] + [["74711", "a"], ["99", "a"]],
    )
    listing = read_listing(settings_of(tag_columns={"PatientID": "PatientID"}), study)
    with pytest.raises(DataError) as caught:
        check_listing(listing)
    assert "2 rows of the table without a DICOM file" in caught.value.state
    assert (
        "line 9 of labels.csv: no DICOM file has its PatientID, but one has it with other leading zeros"
        in caught.value.cause
    )
    assert "line 10 of labels.csv: no DICOM file has its PatientID\n" in caught.value.cause + "\n"
    manifest, result = run(study, tag_columns={"PatientID": "PatientID"}, on_error="quarantine")
    assert len(manifest.rows) == 21 and result.quarantined == 2
    assert "line 10 of labels.csv" in (study / "outputs/manifest/quarantine.csv").read_text()


def test_two_rows_or_two_files_of_one_value(study: Path) -> None:
    rows = [[uid(patient, image), "ab"[patient % 2]] for patient in range(PATIENTS) for image in range(IMAGES)]
    table(study, ["uid", "label"], [*rows, rows[0], rows[4]])
    with pytest.raises(DataError, match=r"2 rows of .*labels.csv with the SOPInstanceUID of another row") as caught:
        run(study, tag_columns={"SOPInstanceUID": "uid"})
    assert "lines 2 and 26" in caught.value.cause and "lines 6 and 27" in caught.value.cause
    table(study, ["uid", "label"], rows)
    shutil.copy(study / "images/DICOM/PA00/ST0/SE0/IM0", study / "images/copy.dcm")
    with pytest.raises(DataError, match="1 SOPInstanceUID of several files") as caught:
        run(study, tag_columns={"SOPInstanceUID": "uid"})
    assert f"{uid(0, 0)}: DICOM/PA00/ST0/SE0/IM0, copy.dcm" in caught.value.cause
    table(study, ["p", "label"], [[f"00{patient}4711", "ab"[patient % 2]] for patient in range(PATIENTS)])
    assert len(run(study, tag_columns={"PatientID": "p"})[0].rows) == 25, "a patient has several files"


def test_files_without_the_element(study: Path) -> None:
    file = study / "images/DICOM/PA00/ST0/SE0/IM0"
    data = pydicom.dcmread(file)
    data.PatientID = ""
    data.save_as(file)
    table(study, ["p", "label"], [[f"00{patient}4711", "ab"[patient % 2]] for patient in range(PATIENTS)])
    manifest, result = run(study, tag_columns={"PatientID": "p"})
    assert len(manifest.rows) == 23
    assert "1 image left out, because its header has no PatientID: DICOM/PA00/ST0/SE0/IM0" in result.notes


def test_rows_without_a_label(study: Path) -> None:
    table(study, ["p", "label"], [[f"00{n}4711", "" if n == 7 else "ab"[n % 2]] for n in range(PATIENTS)])
    manifest, _ = run(study, tag_columns={"PatientID": "p"}, unlabelled="allow")
    assert len(manifest.rows) == 21 and len(manifest.unlabelled) == 3
    assert len({row.group for row in manifest.unlabelled}) == 1


def test_wrong_settings(study: Path) -> None:
    table(study, ["Patient ID", "label"], [["0004711", "a"]])
    with pytest.raises(DataError, match=r"data.tag_columns: \{PatientID: Patient ID\}"):
        read_listing(settings_of(), study)
    with pytest.raises(DataError, match=r"data.tag_columns.Patient: no column 'Patient'"):
        read_listing(settings_of(tag_columns={"Patient": "Patient"}), study)
    with pytest.raises(DataError, match="'PatientIdd' is not an element of DICOM, did you mean 'PatientID'"):
        read_listing(settings_of(tag_columns={"PatientIdd": "Patient ID"}), study)
    with pytest.raises(DataError, match="has no Patient ID"):
        table(study, ["Patient ID", "label"], [["", "a"]])
        read_listing(settings_of(tag_columns={"PatientID": "Patient ID"}), study)
    with pytest.raises(DataError, match="keep_columns names 1 column"):
        table(study, ["Patient ID", "label"], [["0004711", "a"]])
        read_listing(settings_of(tag_columns={"PatientID": "Patient ID"}, keep_columns=["Patient ID"]), study)
    for labels in (None, "tags"):
        with pytest.raises(SettingsError, match="needs a labels table"):
            settings_of(labels=labels, tag_columns={"PatientID": "x"})


def test_repair_needs_a_row_per_file(study: Path) -> None:
    rows = [[f"00{n}4711", "ab"[n % 2], ("train", "val", "test")[n // 2 % 3]] for n in range(6)]
    table(study, ["p", "label", "split"], rows)
    read = read_data(settings_of(tag_columns={"PatientID": "p"}), study)
    with pytest.raises(DataError, match="row for all files with the same elements"):
        plan_repair(read)
