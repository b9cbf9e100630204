"""Choices that `prepare` makes and reports: patients, splits, class names, and skipped files."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

from prepared import fails, make, rows_of, run, table


def patients(study: Path, per_class: int = 4) -> None:
    for index, label in enumerate(("benign", "malignant")):
        shutil.rmtree(study / "data/images" / label)
        for patient in range(per_class):
            for number in range(2):
                place = study / f"data/images/{label}/p{10 * index + patient}/{number}.png"
                make(place, 1000 * index + 10 * patient + number)


def test_sub_folders_are_patients(study: Path) -> None:
    patients(study)
    make(study / "data/images/malignant/p0/2.png", 50)  # a patient with images of two classes
    manifest, summary = run(study)
    assert (summary.unit, summary.groups, summary.singles) == ("patients", 8, 0)
    assert "8 patients" in summary.notes[0]
    splits: dict[str, set[str]] = {}
    for row in manifest.rows:
        assert row.group == row.path.split("/")[1]
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(split) == 1 for split in splits.values())
    _, summary = run(study, group_column=None)
    assert summary.unit is None and "null" in summary.notes[0]


def test_sub_folders_that_may_be_patients(study: Path) -> None:
    patients(study)
    make(study / "data/images/benign/direct.png", 60)
    text = fails(study)
    assert "1 image of 'benign' is in no sub-folder" in text and "data.group_column" in text
    _, summary = run(study, group_column="folder")
    assert (summary.groups, summary.singles) == (8, 1)
    shutil.rmtree(study / "outputs")
    (study / "data/images/benign/direct.png").unlink()
    for patient in (2, 3):
        shutil.rmtree(study / f"data/images/benign/p{patient}")
    assert "'benign' has only 2 sub-folders" in fails(study)
    for label in ("benign", "malignant"):
        shutil.rmtree(study / "data/images" / label)
        for number, name in enumerate(("train", "val", "test")):
            for image in range(2):
                make(study / f"data/images/{label}/{name}/{image}.png", 100 * len(label) + 10 * number + image)
    assert "they are named like splits" in fails(study)


def test_folders_of_splits_are_no_classes(study: Path) -> None:
    (study / "data/images/benign").rename(study / "data/images/Train")
    (study / "data/images/malignant").rename(study / "data/images/test")
    assert "name splits, not classes" in fails(study)


def test_an_official_split_without_val(study: Path) -> None:
    rows = [{**row, "Split": "testing" if Path(row["path"]).stem in "45" else "TRAIN"} for row in rows_of(study)]
    manifest, summary = run(study, labels=table(study, rows))
    official = {row["path"]: row["Split"] for row in rows}
    assert summary.split_column == "Split" and summary.split_images == {"train": 12, "val": 4, "test": 4}
    where: dict[str, set[str]] = {}
    for row in manifest.rows:
        assert (row.split == "test") == (official[row.path] == "testing")
        where.setdefault(row.group, set()).add(row.split)
    assert all(len(splits) == 1 for splits in where.values())


def test_a_split_column_that_is_partly_filled(study: Path) -> None:
    words = {"0": "train", "2": "val", "4": "test"}
    rows = [{**row, "split": words.get(Path(row["path"]).stem, "")} for row in rows_of(study)]
    manifest, _ = run(study, labels=table(study, rows))
    split_of = {row.path: row.split for row in manifest.rows}
    for label in ("benign", "malignant"):
        for first, split in words.items():
            assert split_of[f"{label}/{first}.png"] == split_of[f"{label}/{int(first) + 1}.png"] == split
    assert set(split_of.values()) == {"train", "val", "test"}


def test_class_names(study: Path) -> None:
    rows = [{**row, "label": str(int(row["label"] == "malignant"))} for row in rows_of(study)]
    name = table(study, rows)
    _, summary = run(study, labels=name)
    assert any("data.class_names: {0: ..., 1: ...}" in note for note in summary.notes)
    names = {0: "healthy", 1: "ill"}
    for classes in (["1", "0"], [1, 0], ["ill", "healthy"]):
        manifest, summary = run(study, labels=name, class_names=names, classes=classes)
        assert manifest.classes == ("ill", "healthy")
        assert {row.label for row in manifest.rows if row.path.startswith("malignant")} == {"ill"}
        assert not any("class_names" in note for note in summary.notes)
    shutil.rmtree(study / "outputs")
    assert "'2' (odd)" in fails(study, labels=name, class_names={**names, 2: "odd"})
    assert "'1'" in fails(study, labels=name, class_names={0: "1"})
    assert "twice" in fails(study, labels=name, class_names=names, classes=["1", "ill", "0"])
    manifest, _ = run(study, class_names={"benign": "malignant", "malignant": "benign"})
    assert all(row.label != row.path.split("/")[0] for row in manifest.rows)


def test_all_complaints_about_a_folder_at_once(broken: Path) -> None:
    make(broken / "data/images/=stray.png", 3)
    (broken / "data/images/unclear").mkdir()
    (broken / "data/images/unclear/scan.nrrd").write_bytes(b"x")
    text = fails(broken)
    for part in ("=stray.png", "unclear/", "NRRD, not read yet", "benign/truncated.jpg: the file is truncated"):
        assert part in text
    manifest, summary = run(broken, on_error="quarantine")
    assert manifest.classes == ("benign", "malignant") and summary.quarantined == 5
    assert summary.passed_over == {"NRRD, not read yet": 1}
    with (broken / "outputs/manifest/quarantine.csv").open(newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert "outside of the class folders" in reasons["'=stray.png"]
    assert reasons["unclear/"].startswith("class folder without images")


def test_what_lies_beside_the_class_folders_is_named(study: Path) -> None:
    images = study / "data/images"
    os.mkfifo(images / "pipe")
    (images / "gone").symlink_to("nowhere")
    (images / "scan.nrrd").write_bytes(b"x")
    (images / "Thumbs.db").write_bytes(b"x")
    _, summary = run(study)
    assert summary.passed_over == {".db": 1, "NRRD, not read yet": 1, "broken link": 1, "named pipe": 1}
    text = "\n".join(summary.notes)
    assert all(name in text for name in ("pipe", "gone", "scan.nrrd"))


def test_patients_spelled_alike_are_named(study: Path) -> None:
    rows = rows_of(study)
    _, summary = run(study, labels=table(study, rows))
    assert not any("count as different" in note for note in summary.notes)
    first = rows[0]["patient"]
    rows[0]["patient"] = f" {first.upper()}"
    _, summary = run(study, labels=table(study, rows))
    (warning,) = [note for note in summary.notes if "count as different" in note]
    assert f"{first.upper()!r} and {first!r}" in warning
