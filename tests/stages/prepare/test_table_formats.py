"""Tables as Parquet and Excel give the same images as CSV; cells without a known value are errors."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook
from openpyxl.worksheet.worksheet import Worksheet

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from stages.prepare.label_table import TableRows, read_paths, read_table
from stages.prepare.labelled_image import LabelledImage

HEADER = ["path", "label", "patient", "split", "age"]
ROWS = [
    ["a.png", "0", "007", "train", "61"],
    ["b.png", "1", "008", "val", ""],
    ["c.png", "1", "", "test", "70.5"],
]
ITEMS = [
    LabelledImage("a.png", "0", "007", "train"),
    LabelledImage("b.png", "1", "008", "val"),
    LabelledImage("c.png", "1", None, "test"),
]


def read(folder: Path, name: str, **settings: object) -> TableRows:
    return read_table(DataSettings.model_validate({"labels": name, **settings}), folder, folder)


def as_arrow() -> pa.Table:
    return pa.table({name: [row[at] for row in ROWS] for at, name in enumerate(HEADER)})


def fails(folder: Path, name: str = "labels.xlsx", **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, name, **settings)
    assert caught.value.repair
    return str(caught.value)


@pytest.fixture
def sheet(tmp_path: Path) -> Worksheet:
    """The sheet of a workbook with the rows as a person would type them: numbers as numbers."""
    sheet = Workbook().active
    sheet.append(HEADER)
    sheet.append(["a.png", 0, 7, "train", 61])
    sheet.append(["b.png", 1.0, 8, "val", None])
    sheet.append(["c.png", 1, None, "test", 70.5])
    for row in (2, 3):
        sheet.cell(row, 3).number_format = "000"
    return sheet


@pytest.fixture
def saved(tmp_path: Path, sheet: Worksheet) -> Callable[[], Path]:
    """Saves the workbook."""

    def save() -> Path:
        sheet.parent.save(tmp_path / "labels.xlsx")
        return tmp_path

    return save


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "xlsx", "CSV.parquet"])
def test_all_formats_give_the_same_images(tmp_path: Path, saved: Callable[[], Path], suffix: str) -> None:
    if suffix in ("csv", "tsv"):
        with (tmp_path / f"labels.{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if suffix == "tsv" else ",").writerows([HEADER, *ROWS])
    elif suffix == "xlsx":
        saved()
    else:
        pq.write_table(as_arrow(), tmp_path / f"labels.{suffix}")
    table = read(tmp_path, f"labels.{suffix}")
    assert table.items == ITEMS
    assert [item.others for item in table.items] == [{"age": "61"}, {"age": ""}, {"age": "70.5"}]
    assert read_paths(tmp_path / f"labels.{suffix}", "path") == ["a.png", "b.png", "c.png"]


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "path": ["a.png", "b.png", "c.png"],
            "label": pa.array([1.0, 0.0, 1.0]),
            "patient": pa.array([12, None, 5]),
            "seen": pa.array([datetime.datetime(2024, 5, 31), None, datetime.datetime(2024, 5, 31, 12, 30)]),
            "site": pa.array(["x", "y", "x"]).dictionary_encode(),
            "ill": [True, False, None],
        }
    )
    pq.write_table(table, tmp_path / "labels.parquet")
    items = read(tmp_path, "labels.parquet", site_column="site").items
    assert [(item.label, item.group, item.site) for item in items] == [
        ("1", "12", "x"),
        ("0", None, "y"),
        ("1", "5", "x"),
    ]
    assert [item.others["seen"] for item in items] == ["2024-05-31", "", "2024-05-31 12:30:00"]
    assert [item.others["ill"] for item in items] == ["true", "false", ""]


def test_flags_as_booleans(tmp_path: Path) -> None:
    table = pa.table({"path": ["a.png", "b.png"], "x": [True, False], "y": [True, True]})
    pq.write_table(table, tmp_path / "labels.parquet")
    items = read(tmp_path, "labels.parquet", task="multilabel", label_columns=["x", "y"]).items
    assert [item.label for item in items] == ["x|y", "y"]


def test_a_formula_without_a_result(saved: Callable[[], Path], sheet: Worksheet) -> None:
    sheet["C3"] = '="p"&ROW()'
    sheet["E3"] = "=1+1"
    text = fails(saved())
    assert "column 'patient'" in text and "row 3: a formula without a stored result" in text and "age" not in text


def test_an_error_of_a_formula(saved: Callable[[], Path], sheet: Worksheet) -> None:
    sheet["C4"] = "#N/A"
    assert sheet["C4"].data_type == "e"
    assert "row 4: the error #N/A" in fails(saved())


def test_identifiers_that_excel_has_rounded(saved: Callable[[], Path], sheet: Worksheet) -> None:
    sheet["C4"] = 12345678901234567890
    assert "more than 15 digits" in fails(saved())


def test_merged_cells(saved: Callable[[], Path], sheet: Worksheet) -> None:
    sheet.merge_cells("C2:C3")
    assert "merged cells" in fails(saved()) and "C2:C3" in fails(saved())


def test_dates_and_truth_values(saved: Callable[[], Path], sheet: Worksheet) -> None:
    sheet["E2"], sheet["E3"], sheet["E4"] = datetime.date(2024, 5, 31), True, datetime.datetime(2024, 5, 31, 8, 15)
    items = read(saved(), "labels.xlsx").items
    assert [item.others["age"] for item in items] == ["2024-05-31", "true", "2024-05-31 08:15:00"]


def test_which_sheet_is_read(saved: Callable[[], Path], sheet: Worksheet) -> None:
    notes = sheet.parent.create_sheet("notes", 0)
    notes.append(["something else"])
    assert read(saved(), "labels.xlsx").items == ITEMS
    copy = sheet.parent.copy_worksheet(sheet)
    assert "several sheets" in fails(saved())
    copy.sheet_state = "hidden"
    assert read(saved(), "labels.xlsx").items == ITEMS
    assert "no column 'Label', did you mean 'label'?" in fails(saved(), label_column="Label")


def test_the_number_7_and_the_text_007(tmp_path: Path, sheet: Worksheet, saved: Callable[[], Path]) -> None:
    sheet["C4"] = "7"
    saved()
    groups = [item.group for item in read(tmp_path, "labels.xlsx").items]
    assert groups == ["007", "008", "7"]


def test_blank_rows_and_columns_and_rows_that_are_too_long(saved: Callable[[], Path], sheet: Worksheet) -> None:
    sheet["A7"], sheet["B7"] = "d.png", "1"
    sheet["H9"] = " "
    assert [item.path for item in read(saved(), "labels.xlsx").items] == ["a.png", "b.png", "c.png", "d.png"]
    sheet["H3"] = "beyond the header"
    assert "does not have as many cells as the header" in fails(saved()) and "lines 3" in fails(saved())


@pytest.mark.parametrize("start", [100, 500, 2000])
def test_damaged_workbooks_and_parquet_files(tmp_path: Path, saved: Callable[[], Path], start: int) -> None:
    content = (saved() / "labels.xlsx").read_bytes()
    (tmp_path / "labels.xlsx").write_bytes(content[:start])
    assert "CSV UTF-8" in fails(tmp_path)
    pq.write_table(as_arrow(), tmp_path / "labels.parquet")
    content = (tmp_path / "labels.parquet").read_bytes()
    (tmp_path / "labels.parquet").write_bytes(content[: len(content) * start // 2500])
    assert "Parquet" in fails(tmp_path, "labels.parquet")
