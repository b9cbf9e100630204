"""Images without a label: in the manifest and the cache, never in a split."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import save as save_dicom
from pictures import picture, recompressed, save

from schemas.errors import DataError, SettingsError
from schemas.manifest import UNLABELLED, Manifest, PrepareResult
from schemas.parse import parse_settings
from stages.groups import manifest_clusters
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.prepare.exports import write_splits
from stages.prepare.folds import draw_folds
from stages.prepare.shots import draw_shots

ROWS = 24


def table(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(root: Path, **data: Any) -> tuple[Manifest, PrepareResult]:
    raw = {"images": "images", "labels": "labels.csv", "unlabelled": "allow", **data}
    settings = parse_settings({"data": raw})
    result = prepare(settings.data, root, root / "outputs/manifest", history=root / ".fpt/splits")
    return read_manifest(root / "outputs/manifest/manifest.parquet"), result


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    """Two classes, and every fourth image without a label, in three spellings."""
    made = []
    for number in range(ROWS):
        save(picture(number), tmp_path / f"images/{number:02}.png")
        label = ("", "NaN", "?")[number // 4 % 3] if number % 4 == 3 else "ab"[number % 2]
        made.append({"path": f"{number:02}.png", "label": label, "patient": f"p{number}", "age": "50"})
    return made


def test_they_have_no_split(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    table(tmp_path, rows)
    manifest, result = run(tmp_path, keep_columns=["age"])
    missing = [f"{number:02}.png" for number in range(3, ROWS, 4)]
    assert [row.path for row in manifest.unlabelled] == missing and result.unlabelled == len(missing)
    assert {(row.label, row.split, row.kept["age"]) for row in manifest.unlabelled} == {("", UNLABELLED, "50")}
    assert len(manifest.rows) == ROWS - len(missing) == result.images == sum(result.split_images.values())
    assert len(manifest.ids()) == ROWS and manifest.classes == ("a", "b")
    assert "6 images without a label" in "\n".join(result.notes)
    for drawn in (*draw_folds(manifest, 3, 0.2, 0), draw_shots(manifest, 1, 0)):
        assert drawn.unlabelled == manifest.unlabelled
        assert not {row.path for row in drawn.rows} & set(missing)
    with pytest.raises(DataError, match=r"6 rows of .*labels.csv have no label"):
        run(tmp_path, unlabelled="error")


def test_a_label_that_comes_later_is_a_change(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    table(tmp_path, rows)
    before, _ = run(tmp_path)
    rows[3]["label"] = "a"
    table(tmp_path, rows)
    after, result = run(tmp_path)
    assert "1 image relabelled" in result.changes[0] and "added" not in result.changes[0]
    assert before.ids() == after.ids() and len(after.unlabelled) == len(before.unlabelled) - 1
    splits = {row.path: row.split for row in after.rows}
    assert all(splits[row.path] == row.split for row in before.rows)


def test_they_join_what_belongs_together(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    """An image without a label of one patient is a near-duplicate of another patient's image, in another split."""
    save(recompressed(picture(0)), tmp_path / "images/03.png")
    rows[3]["patient"] = "p1"
    table(tmp_path, rows)
    manifest, _ = run(tmp_path)
    together = [cluster.paths for cluster in manifest_clusters(manifest) if len(cluster.paths) > 1]
    assert together == [("00.png", "01.png")]
    split_of = {row.path: row.split for row in manifest.rows}
    assert split_of["00.png"] == split_of["01.png"]
    table(tmp_path, [{**row, "split": ("train", "val", "test")[number // 2 % 3]} for number, row in enumerate(rows)])
    run(tmp_path)
    rows = [{**row, "split": ("train", "val", "test")[number % 3]} for number, row in enumerate(rows)]
    table(tmp_path, rows)
    with pytest.raises(DataError, match=r"images connected with 00.png: 00.png .train., 01.png .val."):
        run(tmp_path)
    with pytest.raises(DataError, match="images connected"):
        run(tmp_path, allow_leaks=["content"])
    run(tmp_path, allow_leaks=["near"])


def test_copies_of_labelled_images(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    shutil.copy(tmp_path / "images/00.png", tmp_path / "images/03.png")
    table(tmp_path, rows)
    manifest, result = run(tmp_path)
    assert manifest.unlabelled[0].id == manifest.rows[0].id and len(manifest.ids()) == ROWS - 1
    assert "1 of them are copies" in "\n".join(result.notes)


def test_tables_for_reuse_have_them(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    table(tmp_path, rows)
    manifest, result = run(tmp_path)
    data = parse_settings({"data": {"labels": "labels.csv"}}).data
    write_splits(manifest, result, data, tmp_path / "splits.csv")
    again, _ = run(tmp_path, labels="splits.csv")
    assert again == manifest


def test_multi_label(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    """An empty cell means none of the labels; with a column per label all cells of a row have to be empty."""
    labels = ("x", "y", "x|y", "", "NaN", "x")
    table(tmp_path, [{**row, "label": labels[number % 6]} for number, row in enumerate(rows)])
    manifest, result = run(tmp_path, task="multilabel")
    assert [row.path for row in manifest.unlabelled] == [f"{number:02}.png" for number in range(4, ROWS, 6)]
    assert sum(row.label == "" for row in manifest.rows) == 4
    data = parse_settings({"data": {"task": "multilabel", "labels": "labels.csv"}}).data
    write_splits(manifest, result, data, tmp_path / "splits.csv")
    assert run(tmp_path, task="multilabel", labels="splits.csv")[0] == manifest

    flags = [("1", "0"), ("0", "1"), ("0", "0"), ("", "")]
    columns = [{**row, "x": flags[n % 4][0], "y": flags[n % 4][1]} for n, row in enumerate(rows)]
    table(tmp_path, columns)
    by_column = {"task": "multilabel", "label_columns": ["x", "y"]}
    manifest, _ = run(tmp_path, **by_column)
    assert [row.path for row in manifest.unlabelled] == [f"{number:02}.png" for number in range(3, ROWS, 4)]
    columns[0]["y"] = ""
    table(tmp_path, columns)
    with pytest.raises(DataError, match="1 cell of column 'y'"):
        run(tmp_path, **by_column)


def test_a_class_may_be_called_none(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    table(tmp_path, [{**row, "label": ("none", "mild", "NA")[number % 3]} for number, row in enumerate(rows)])
    manifest, _ = run(tmp_path, task="ordinal", classes=["none", "mild"])
    assert manifest.classes == ("none", "mild") and len(manifest.unlabelled) == ROWS // 3


def test_images_outside_of_class_folders(tmp_path: Path) -> None:
    for number in range(12):
        save(picture(number), tmp_path / f"images/{'ab'[number % 2]}/{number}.png")
    save(picture(20), tmp_path / "images/later.png")
    manifest, _ = run(tmp_path, labels=None)
    assert [row.path for row in manifest.unlabelled] == ["later.png"] and len(manifest.rows) == 12


def test_headers_without_a_label(tmp_path: Path) -> None:
    for number in range(12):
        label = {} if number % 6 == 5 else {"BodyPartExamined": ("CHEST", "HAND")[number % 2]}
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24)).astype(np.uint8)
        save_dicom(tmp_path / f"images/{number:02}", pixels, PatientID=f"P{number}", **label)
    save(picture(20), tmp_path / "images/photo.png")
    manifest, _ = run(tmp_path, labels="tags")
    assert [row.path for row in manifest.unlabelled] == ["05", "11", "photo.png"]
    assert manifest.unlabelled[0].group != "05" and manifest.unlabelled[2].group == "photo.png"
    assert manifest.unit == "patients" and len(manifest.rows) == 10


def test_no_label_at_all_and_unknown_values(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    table(tmp_path, [{**row, "label": ""} for row in rows])
    with pytest.raises(DataError, match="No image has a label"):
        run(tmp_path)
    with pytest.raises(SettingsError, match="unlabelled"):
        parse_settings({"data": {"unlabelled": "train"}})
