"""Label tables as written by people and spreadsheets."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from stages.prepare.label_table import TableRows, check_files, read_table
from stages.prepare.labelled_image import LabelledImage

PLAIN = "path,label,patient\na/1.png,x,p1\na/2.png,y,p2\n"
ITEMS = [LabelledImage("a/1.png", "x", "p1"), LabelledImage("a/2.png", "y", "p2")]


def read(tmp_path: Path, content: str | bytes, **settings: str) -> list[LabelledImage]:
    (tmp_path / "labels.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    data = DataSettings.model_validate({"labels": "labels.csv", "group_column": "patient", **settings})
    return read_table(data, tmp_path, tmp_path / "images").items


def fails(tmp_path: Path, content: str | bytes, **settings: str) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, **settings)
    assert "labels.csv" in caught.value.state
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", " , "),
        PLAIN + "\n\n,,\n",
        PLAIN.replace("a/1.png", '"a/1.png"'),
        PLAIN.replace("a/", "./a//"),
        PLAIN.replace("a/", "a\\"),
        "nr;patient;label;path;note\n1;p1;x;a/1.png;one, two\n2;p2;y;a/2.png;\n",
        "path,label,patient\na/2.png,y,p2\na/1.png,x,p1",
    ],
)
def test_the_same_rows(tmp_path: Path, content: str | bytes) -> None:
    assert read(tmp_path, content) == ITEMS


def test_names_beyond_ascii(tmp_path: Path) -> None:
    assert read(tmp_path, "path,label,patient\nä b.png,naïve,\n") == [LabelledImage("ä b.png", "naïve", None)]


def test_absolute_paths_below_the_images(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN.replace("a/", f"{tmp_path}/images/a/")) == ITEMS


@pytest.mark.parametrize("path", ["../x.png", "/x.png", "a/../../x.png", "."])
def test_paths_outside_of_the_images(tmp_path: Path, path: str) -> None:
    text = fails(tmp_path, PLAIN + f"{path},x,p\n")
    assert f"line 4: {path}" in text and "data.images" in text


def test_columns_with_typos(tmp_path: Path) -> None:
    text = fails(tmp_path, PLAIN, label_column="lable", group_column="Patient_ID", path_column="PATH")
    assert "data.label_column: no column 'lable', did you mean 'label'?" in text
    assert "data.group_column: no column 'Patient_ID', did you mean 'patient'?" in text
    assert "data.path_column: no column 'PATH', did you mean 'path'?" in text
    assert "existing columns: path, label, patient" in text


def test_a_column_twice(tmp_path: Path) -> None:
    assert "2 columns 'label'" in fails(tmp_path, "path,label,label,patient\na.png,x,y,p\n")


def test_empty_cells_short_rows_and_double_paths(tmp_path: Path) -> None:
    assert "2 rows of" in fails(tmp_path, PLAIN + "a/3.png,,p\na/4.png, ,p\n")
    assert "has no label" in fails(tmp_path, PLAIN + "a/3.png,,p\n")
    assert "line 4: empty\n  line 5: empty" in fails(tmp_path, PLAIN + "a/3.png,,p\na/4.png, ,p\n")
    assert "has no path" in fails(tmp_path, PLAIN + ",x,p\n")
    assert "as many cells" in fails(tmp_path, PLAIN + "a/3.png,x\n")
    assert "a/1.png: lines 2 and 4" in fails(tmp_path, PLAIN + "a/./1.png,x,p1\n")


def test_splits(tmp_path: Path) -> None:
    content = "path,label,patient,split\na.png,x,,train\nb.png,x,,val\n"
    assert [item.split for item in read(tmp_path, content, split_column="split")] == ["train", "val"]
    text = fails(tmp_path, content + "c.png,x,,vall\nd.png,x,,\ne.png,x,,2\n", split_column="split")
    assert "line 4: 'vall', did you mean 'val'?" in text and "line 6: '2'" in text and "line 5" not in text
    assert "train, val, test" in text


def test_files_that_are_no_table(tmp_path: Path) -> None:
    assert "has no rows" in fails(tmp_path, "")
    assert "has no rows" in fails(tmp_path, "path,label,patient\n")
    assert "not UTF-8" in fails(tmp_path, "path,label,patient\nä.png,x,p\n".encode("latin-1"))
    assert "columns" in fails(tmp_path, "just some text\nand more\n")
    (tmp_path / "labels.csv").unlink()
    data = DataSettings(labels="labels.csv")
    with pytest.raises(DataError, match="There is no table"):
        read_table(data, tmp_path, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(data.model_copy(update={"labels": "."}), tmp_path, tmp_path)


def rows_of(tmp_path: Path, content: str, **settings: object) -> TableRows:
    (tmp_path / "labels.csv").write_text(content)
    return read_table(DataSettings.model_validate({"labels": "labels.csv", **settings}), tmp_path, tmp_path / "images")


@pytest.mark.parametrize(
    "name", ["patient", "patient_id", "Patient ID", "SUBJECT", "subject-id", "case", "CaseID", "group"]
)
def test_patients_by_the_name_of_the_column(tmp_path: Path, name: str) -> None:
    table = rows_of(tmp_path, f"path,label,{name}\na.png,x,p1\nb.png,y,\n")
    assert table.group_column == name
    assert [item.group for item in table.items] == ["p1", None]
    assert repr(name) in table.notes[0]


def test_two_columns_that_may_be_patients(tmp_path: Path) -> None:
    content = "path,label,patient,case\na.png,x,p1,c1\n"
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, content)
    assert "'patient'\n  'case'" in caught.value.cause and "data.group_column" in caught.value.repair
    assert rows_of(tmp_path, content, group_column="case").items[0].group == "c1"
    table = rows_of(tmp_path, content, group_column=None)
    assert table.items[0].group is None and "is not used" in table.notes[0]


def test_a_column_with_another_meaning_is_no_patient(tmp_path: Path) -> None:
    table = rows_of(tmp_path, "path,group\na.png,x\n", label_column="group")
    assert table.group_column is None and table.items[0].label == "x"


@pytest.mark.parametrize("word", ["nan", "NaN", "N/A", "null", "<NA>", "-", "NA", "None", "#N/A"])
def test_an_unknown_patient_is_no_patient(tmp_path: Path, word: str) -> None:
    table = rows_of(tmp_path, f"path,label,patient\na.png,x,{word}\nb.png,y,{word}\n")
    assert [item.group for item in table.items] == [None, None]


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *[(word, "train") for word in ("TRAIN", "Train", "training")],
        *[(word, "val") for word in ("Val", "validation", "valid", "dev")],
        *[(word, "test") for word in ("Test", "testing")],
        *[(word, None) for word in ("", "nan")],
    ],
)
def test_words_for_a_split(tmp_path: Path, word: str, split: str | None) -> None:
    assert rows_of(tmp_path, f"path,label,Split\na.png,x,{word}\n").items[0].split == split


def test_a_column_of_other_words_is_no_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split_column: null"):
        rows_of(tmp_path, "path,label,split\na.png,x,1\n")
    assert rows_of(tmp_path, "path,label,split\na.png,x,1\n", split_column=None).items[0].split is None


@pytest.mark.parametrize("word", ["NaN", "nan", "NULL", "N/A", "?", "-", "#REF!", "NA", "none"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_missing_label_is_no_class(tmp_path: Path, word: str, task: str) -> None:
    content = f"path,label\na.png,x\nb.png,{word}\nc.png,y\nd.png,{word}\n"
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, content, task=task)
    assert "2 rows" in caught.value.state and "have no label" in caught.value.state
    assert f"line 3: {word!r}" in caught.value.cause and f"line 5: {word!r}" in caught.value.cause
    assert "data.classes" in caught.value.repair
    assert rows_of(tmp_path, content, task=task, classes=["x", "y", word]).items[1].label == word
    assert rows_of(tmp_path, content, task=task, class_names={word: "nothing"}).items[1].label == word


def workbook(names: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in names.items():
            archive.writestr(name, text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (workbook({"[Content_Types].xml": "", "xl/workbook.xml": ""}), "Excel workbook"),
        (workbook({"mimetype": "application/vnd.oasis.opendocument.spreadsheet", "content.xml": ""}), "(ODS)"),
        (workbook({"labels.csv": "path,label"}), "ZIP archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, "Excel workbook (XLS)"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"\x80\x04\x95", "pickle"),
        ("path,label\na.png,x\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    text = fails(tmp_path, content)
    assert kind in text and "CSV UTF-8" in text


def test_pipes_devices_and_giants_are_refused(tmp_path: Path) -> None:
    data = DataSettings(labels="labels.csv")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "labels.csv")
        with pytest.raises(DataError, match="pipe, a socket or a device"):
            read_table(data, tmp_path, tmp_path)
        (tmp_path / "labels.csv").unlink()
    for start in (b"", b"path,label\n" * 10_000):
        with (tmp_path / "labels.csv").open("wb") as file:
            file.write(start)
            file.truncate(2**40)
        with pytest.raises(DataError, match=r"NUL|too large"):
            read_table(data, tmp_path, tmp_path)


def test_a_quote_that_is_never_closed_takes_no_rows_along(tmp_path: Path) -> None:
    assert "not a CSV" in fails(tmp_path, 'path,patient,label\na.png,,"x\nb.png,,y\n')
    assert "not a CSV" in fails(tmp_path, 'path,patient,label\na.png,,"x\nb.png,,"y\n')


def test_a_path_longer_than_any_file_system_allows(tmp_path: Path) -> None:
    items = read(tmp_path, PLAIN + f"{'x' * 5000}.png,x,p\n")
    with pytest.raises(DataError, match="3 images of 3 rows"):
        check_files(items, tmp_path, "labels.csv")
