"""`fpt data repair`: the new table has no leak and all test images; the user's table stays as it is."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from openpyxl import Workbook
from pictures import picture, recompressed, save

from schemas.data_check import Repair
from schemas.data_settings import DataSettings
from schemas.errors import DataError
from stages.data_check.check import read_data
from stages.data_check.repair import default_output, plan_repair, write_repair
from stages.prepare import prepare

Rows = list[dict[str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Forty pictures of two classes and their table: content, patient and near-duplicates in two splits."""
    images = tmp_path / "images"
    made = []
    for number in range(40):
        save(picture(number), images / f"{number:02}.png")
        split = ("train", "train", "val", "test")[number // 2 % 4]
        made.append(
            {
                "path": f"{number:02}.png",
                "label": "ab"[number % 2],
                "patient": f"p{number:02}",
                "split": split,
                "note": "",
            }
        )
    shutil.copy(images / "06.png", images / "copy.png")
    save(recompressed(picture(4)), images / "near.png")
    made.append({"path": "copy.png", "label": "a", "patient": "x", "split": "train", "note": ' =1+1, "quoted" '})
    made.append({"path": "near.png", "label": "a", "patient": "y", "split": "train", "note": ""})
    made[7]["patient"] = made[1]["patient"]
    return made


@pytest.fixture
def repaired(tmp_path: Path) -> Callable[..., tuple[Repair, Rows]]:
    """Writes the rows to labels.csv, repairs the table, and reads the new one."""

    def run(rows: Rows, **settings: object) -> tuple[Repair, Rows]:
        table = tmp_path / "labels.csv"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        before = table.read_bytes()
        data = DataSettings.model_validate({"images": "images", "labels": "labels.csv", **settings})
        read = read_data(data, tmp_path)
        plan = plan_repair(read)
        output = default_output(data, tmp_path)
        write_repair(plan, read, tmp_path, output, output.with_suffix(".report.csv"))
        assert table.read_bytes() == before
        with output.open(newline="") as file:
            return plan, list(csv.DictReader(file))

    return run


def test_train_and_val_lose_what_test_has(
    tmp_path: Path, rows: Rows, repaired: Callable[..., tuple[Repair, Rows]]
) -> None:
    data = DataSettings(images="images", labels="labels.csv")
    plan, new = repaired(rows)
    assert [(image.path, image.split, image.kept) for image in plan.dropped] == [
        ("01.png", "train", "test"),
        ("copy.png", "train", "test"),
        ("near.png", "train", "val"),
    ]
    assert "patient" in plan.dropped[0].reason and "content" in plan.dropped[1].reason
    assert "nearly the same" in plan.dropped[2].reason
    with pytest.raises(DataError, match="3 leaks"):
        prepare(data, tmp_path, tmp_path / "out")
    assert new == [row for row in rows if row["path"] not in ("01.png", "copy.png", "near.png")]
    assert prepare(data.model_copy(update={"labels": "labels.repaired.csv"}), tmp_path, tmp_path / "out").images == 39
    with (tmp_path / "labels.repaired.report.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["01.png", "copy.png", "near.png"]


def test_cells_are_copied_exactly(rows: Rows, repaired: Callable[..., tuple[Repair, Rows]]) -> None:
    rows[0]["note"], rows[2]["note"] = " blanks ", 'two\nlines, "quotes" and = signs'
    _, new = repaired(rows)
    assert new[0]["note"].strip() == "blanks" and new[1]["note"] == rows[2]["note"]


def test_what_is_allowed_is_no_leak(rows: Rows, repaired: Callable[..., tuple[Repair, Rows]]) -> None:
    plan, _ = repaired(rows, allow_leaks=("near", "patient"))
    assert [image.path for image in plan.dropped] == ["copy.png"]


def test_conflicting_labels_are_left_to_a_person(rows: Rows, repaired: Callable[..., tuple[Repair, Rows]]) -> None:
    rows[-1]["label"], rows[-1]["split"] = "b", "val"
    plan, _ = repaired(rows)
    assert [copies.paths for copies in plan.conflicts] == [("04.png", "near.png")]


def test_existing_files_are_kept(tmp_path: Path, rows: Rows, repaired: Callable[..., tuple[Repair, Rows]]) -> None:
    (tmp_path / "labels.repaired.csv").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        repaired(rows)
    assert (tmp_path / "labels.repaired.csv").read_text() == "mine"


def test_a_workbook_becomes_a_csv(tmp_path: Path, rows: Rows) -> None:
    book = Workbook()
    for row in (list(rows[0]), *(list(row.values()) for row in rows)):
        book.active.append(row)
    book.active["E3"].data_type = "s"
    book.active["E3"].value = "'=cmd"
    book.save(tmp_path / "labels.xlsx")
    data = DataSettings(images="images", labels="labels.xlsx")
    read = read_data(data, tmp_path)
    output = default_output(data, tmp_path)
    write_repair(plan_repair(read), read, tmp_path, output, output.with_suffix(".report.csv"))
    again = read_data(data.model_copy(update={"labels": output.name}), tmp_path)
    assert plan_repair(again).dropped == ()
    left = {item.path: item for item in read.listing.items}
    assert all(item == left[item.path] and item.others == left[item.path].others for item in again.listing.items)


def test_without_given_splits_there_is_nothing_to_repair(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(DataError, match="class folders"):
        default_output(DataSettings(images="images"), tmp_path)
    (tmp_path / "labels.csv").write_text("path,label\n00.png,a\n01.png,b\n")
    with pytest.raises(DataError, match="no split is given"):
        plan_repair(read_data(DataSettings(images="images", labels="labels.csv"), tmp_path))
