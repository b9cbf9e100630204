"""Tables as people and spreadsheets write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import DataError
from schemas.settings import DataSettings
from stages.prepare.scan import Item
from stages.prepare.table import read_table

PLAIN = "path,label,patient\na/1.png,x,p1\na/2.png,y,p2\n"
ITEMS = [Item("a/1.png", "x", "p1"), Item("a/2.png", "y", "p2")]


def read(tmp_path: Path, content: str | bytes, **settings: str) -> list[Item]:
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
    assert read(tmp_path, "path,label,patient\nä b.png,naïve,\n") == [Item("ä b.png", "naïve", None)]


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
    assert "columns there: path, label, patient" in text


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
    with pytest.raises(DataError, match="There is no CSV"):
        read_table(data, tmp_path, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(data.model_copy(update={"labels": "."}), tmp_path, tmp_path)
