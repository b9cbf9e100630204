"""End-to-end tests of `prepare`: from folders and tables to a manifest or one clear error."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from prepared import fails, make, rows_of, run, table

from schemas.data_settings import DataSettings
from schemas.errors import DataError, StorageError, UnreadableImagesError
from schemas.manifest import PrepareSummary
from stages.files import sha256_file
from stages.prepare import prepare
from stages.prepare.class_folders import scan_folders


def test_class_folders(study: Path) -> None:
    manifest, summary = run(study)
    images = study / "data" / "images"
    assert manifest.classes == ("benign", "malignant")
    assert [row.path for row in manifest.rows] == sorted(f"{c}/{n}.png" for c in manifest.classes for n in range(10))
    for row in manifest.rows:
        assert row.id == sha256_file(images / row.path)
        assert row.label == row.path.split("/")[0]
        assert row.group == row.path
    per_class = {"train": 6, "val": 2, "test": 2}
    expected = PrepareSummary(
        images=20,
        duplicates=0,
        groups=0,
        singles=20,
        quarantined=0,
        counts={split: {"benign": n, "malignant": n} for split, n in per_class.items()},
        split_images={split: 2 * n for split, n in per_class.items()},
    )
    assert Counter((row.split, row.label) for row in manifest.rows) == {
        (split, label): n for split, n in per_class.items() for label in manifest.classes
    }
    written = json.loads((study / "outputs/manifest/summary.json").read_text())
    assert PrepareSummary.model_validate(written) == expected
    assert summary.model_dump() == {**expected.model_dump(), "known": 0, "moved": {}, "changes": (), "notes": ()}
    assert sorted(file.name for file in (study / "outputs/manifest").iterdir()) == ["manifest.parquet", "summary.json"]


def test_deeper_folders_other_suffixes_hidden_files_and_links(study: Path) -> None:
    images = study / "data" / "images"
    make(images / "benign/deep/er/x.PNG", 1000)
    make(images / "benign/y.TIFF", 1001)
    (images / "benign/notes.txt").write_text("not an image")
    (images / "benign/._0.png").write_bytes(b"left by an archive")
    make(images / "benign/.cache/z.png", 1002)
    make(images / ".hidden/z.png", 1003)
    (images / "__MACOSX").mkdir()
    make(study / "elsewhere/linked.png", 1004)
    (images / "benign/link").symlink_to(study / "elsewhere")
    (images / "benign/loop").symlink_to(images / "benign")
    manifest, _ = run(study)
    extra = {row.path for row in manifest.rows} - {f"{c}/{n}.png" for c in manifest.classes for n in range(10)}
    assert extra == {"benign/deep/er/x.PNG", "benign/y.TIFF", "benign/link/linked.png"}


def test_same_settings_same_bytes(study: Path) -> None:
    run(study)
    first = {file.name: file.read_bytes() for file in (study / "outputs/manifest").iterdir()}
    run(study)
    assert {file.name: file.read_bytes() for file in (study / "outputs/manifest").iterdir()} == first


def test_moved_images_keep_their_split(study: Path) -> None:
    before, _ = run(study)
    split_of = {row.id: row.split for row in before.rows}
    shutil.move(study / "data/images", study / "moved")
    for number, path in enumerate(sorted((study / "moved").rglob("*.png"))):
        path.rename(path.with_name(f"renamed-{97 * number % 20}.png"))
    after, _ = run(study, images="moved")
    assert {row.id: row.split for row in after.rows} == split_of


def test_absolute_folders(study: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = table(study, rows_of(study))
    root = tmp_path_factory.mktemp("root")
    output = root / "outputs"
    settings = DataSettings(images=str(study / "data/images"), labels=str(study / name))
    assert prepare(settings, root, output).images == 20


def test_progress_counts_to_the_end(study: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(DataSettings(), study, study / "out", lambda done, total: seen.append((done, total)))
    assert seen == [(done, 20) for done in range(1, 21)]


def test_copies_share_a_split_and_are_counted(study: Path) -> None:
    images = study / "data/images/benign"
    for number in range(5):
        shutil.copy(images / f"{number}.png", images / f"copy{number}.png")
    for seed in range(3):
        manifest, summary = run(study, seed=seed)
        assert summary.duplicates == 10 and summary.images == 25
        splits = {row.path: row.split for row in manifest.rows}
        assert all(splits[f"benign/{n}.png"] == splits[f"benign/copy{n}.png"] for n in range(5))


def test_one_content_under_two_labels(study: Path) -> None:
    images = study / "data/images"
    shutil.copy(images / "benign/3.png", images / "malignant/x.png")
    text = fails(study)
    assert "benign/3.png (benign) = malignant/x.png (malignant)" in text
    assert "two labels" in fails(study, on_error="quarantine")


def test_an_empty_class(study: Path) -> None:
    (study / "data/images/unclear").mkdir()
    (study / "data/images/unclear/scan.nrrd").write_bytes(b"x")
    text = fails(study)
    assert "1 class without images" in text and "unclear" in text and ".nrrd" in text


def test_one_class_only(study: Path) -> None:
    shutil.rmtree(study / "data/images/malignant")
    assert "the same label: 'benign'" in fails(study)


def test_no_class_folders_stray_images_and_no_folder(study: Path) -> None:
    make(study / "flat/0.png", 0)
    assert "no class folders" in fails(study, images="flat")
    make(study / "data/images/stray.png", 0)
    text = fails(study)
    assert "stray.png" in text and "outside of the class folders" in text
    assert "data.images" in fails(study, images="nowhere")


def test_a_folder_that_may_not_be_read(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(study / "data/images/benign/locked/x.png", 700)
    (study / "data/images/benign/locked").chmod(0)
    # Root can read everything, so the test runs as another user, in a folder that this user can access.
    study.chmod(0o755)
    monkeypatch.chdir(study)
    uid = os.geteuid()
    try:
        if uid == 0:
            os.seteuid(65534)
        with pytest.raises(DataError) as caught:
            scan_folders(Path("data/images"))
    finally:
        if uid == 0:
            os.seteuid(0)
        (study / "data/images/benign/locked").chmod(0o755)
    assert "locked cannot be read" in caught.value.state and "Permission denied" in caught.value.cause


def test_a_name_that_is_no_text(study: Path) -> None:
    images = study / "data/images/benign"
    try:
        (images / "0.png").rename(images / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system has only names that are text")
    text = fails(study)
    assert "not text" in text and r"benign/\udcff.png" in text
    text.encode()


def test_a_class_with_two_images(study: Path) -> None:
    for number in range(2):
        make(study / f"data/images/rare/{number}.png", 500 + number)
    assert "'rare': 2 images" in fails(study)


def test_listed_classes(study: Path) -> None:
    manifest, summary = run(study, classes=("malignant", "benign"))
    assert manifest.classes == ("malignant", "benign")
    assert list(summary.counts["train"]) == ["malignant", "benign"]


def test_listed_classes_that_differ_from_the_labels(study: Path) -> None:
    text = fails(study, classes=("benign", "malignent", "cyst"))
    assert "'malignant', 10 images: not in data.classes, did you mean 'malignent'?" in text
    assert "'cyst': in data.classes, but no image has it" in text


REASONS = {
    "benign/dot.png": "min_side (16)",
    "benign/truncated.jpg": "the file is truncated",
    "malignant/empty.png": "the file is empty",
    "malignant/large.png": "max_pixels",
    "malignant/text.png": "is not a PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI image",
}


def test_all_unreadable_images_are_listed_at_once(broken: Path) -> None:
    with pytest.raises(UnreadableImagesError) as caught:
        run(broken, max_pixels=80_000)
    assert [path for path, _ in caught.value.failures] == sorted(REASONS)
    assert all(REASONS[path] in reason for path, reason in caught.value.failures)
    assert "quarantine" in caught.value.repair
    assert not (broken / "outputs").exists()


def test_quarantine(broken: Path) -> None:
    manifest, summary = run(broken, max_pixels=80_000, on_error="quarantine")
    assert summary.quarantined == 5 and summary.images == 20
    assert not {row.path for row in manifest.rows} & REASONS.keys()
    quarantine = broken / "outputs/manifest/quarantine.csv"
    with quarantine.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(REASONS)
    assert all(REASONS[row["path"]] in row["reason"] and row["label"] in row["path"] for row in rows)

    for path in REASONS:
        (broken / "data/images" / path).unlink()
    run(broken, on_error="quarantine")
    assert not quarantine.exists(), "a list of an earlier run would accuse images that are gone"


def test_quarantine_does_not_take_a_whole_class(study: Path) -> None:
    for path in (study / "data/images/benign").iterdir():
        path.write_bytes(b"")
    text = fails(study, on_error="quarantine")
    assert "No image of 'benign'" in text and "10 images" in text


def test_a_table_with_patients(study: Path) -> None:
    manifest, summary = run(study, labels=table(study, rows_of(study)), group_column="patient")
    assert summary.groups == 10
    splits: dict[str, set[str]] = {}
    for row in manifest.rows:
        assert row.group == f"{row.label}-{int(Path(row.path).stem) // 2}"
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(split) == 1 for split in splits.values())


def test_the_order_of_a_table_does_not_matter(study: Path) -> None:
    rows = rows_of(study)
    first, _ = run(study, labels=table(study, rows), group_column="patient")
    second, _ = run(study, labels=table(study, rows[::-1]), group_column="patient")
    assert first == second


def test_an_image_without_a_patient_stands_for_itself(study: Path) -> None:
    rows = [{**row, "patient": "" if row["label"] == "benign" else row["patient"]} for row in rows_of(study)]
    manifest, summary = run(study, labels=table(study, rows), group_column="patient")
    assert (summary.unit, summary.groups, summary.singles) == ("patients", 5, 10)
    assert all(row.group == row.path for row in manifest.rows if row.label == "benign")


def test_missing_files_of_a_table(study: Path) -> None:
    rows = [*rows_of(study), {"path": "benign/98.png", "label": "benign", "patient": "x"}]
    rows += [{"path": "benign/99.png", "label": "benign", "patient": "x"}]
    name = table(study, rows)
    text = fails(study, labels=name)
    assert "2 images of 22 rows" in text and "benign/98.png" in text and "benign/99.png" in text
    _, summary = run(study, labels=name, on_error="quarantine")
    assert summary.quarantined == 2
    assert "benign/98.png,benign,x,no such file" in (study / "outputs/manifest/quarantine.csv").read_text()


def test_a_table_whose_paths_start_higher(study: Path) -> None:
    rows = [{**row, "path": f"images/{row['path']}"} for row in rows_of(study)]
    assert "start above" in fails(study, labels=table(study, rows))


def test_ready_splits_of_a_table(study: Path) -> None:
    rows = [{**row, "fold": {"8": "val", "9": "test"}.get(Path(row["path"]).stem, "train")} for row in rows_of(study)]
    name = table(study, rows)
    manifest, _ = run(study, labels=name, split_column="fold", group_column=None)
    assert {row.path: row.split for row in manifest.rows} == {row["path"]: row["fold"] for row in rows}
    shutil.rmtree(study / "outputs")
    assert "patient 'benign-4'" in fails(study, labels=name, split_column="fold", group_column="patient")


def test_a_full_or_unwritable_disk(study: Path) -> None:
    (study / "outputs").write_text("a file")
    with pytest.raises(StorageError, match="outputs"):
        run(study)
