"""`fpt data check` on a miniature with every defect that it looks for."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, recompressed, save
from PIL import Image

from schemas.data_check import DataCheck
from schemas.data_settings import DataSettings
from stages.data_check.check import ReadData, check_data, read_data
from stages.data_check.page import render_check
from stages.data_check.wording import findings


def rows_of(images: Path) -> list[dict[str, str]]:
    return [
        {
            "path": path.relative_to(images).as_posix(),
            "label": path.parent.name,
            "patient": f"p{path.stem}",
            "site": "north" if path.parent.name == "ill" else "south",
            "split": ("train", "val", "test")[at % 3],
        }
        for at, path in enumerate(sorted(images.rglob("*.*")))
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty pictures; those of the ill are larger and from another site."""
    images = tmp_path / "images"
    for number in range(40):
        ill = number % 2
        save(picture(number, 100 + 30 * ill + number % 3), images / f"{'ill' if ill else 'well'}/{number:02}.png")
    shutil.copy(images / "ill/01.png", images / "well/copy.png")
    save(recompressed(picture(2)).resize((110, 110)), images / "well/near.png")
    Image.new("L", (120, 120), 77).save(images / "well/blank.png")
    Image.fromarray(np.asarray(picture(99, 20))).save(images / "ill/tiny.png")
    picture(98, 150).convert("RGB").save(images / "ill/colour.jpg", quality=95)
    content = (images / "ill/03.png").read_bytes()
    (images / "ill/cut.png").write_bytes(content[: len(content) // 2])
    rows = rows_of(images)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


@pytest.fixture
def read(root: Path) -> ReadData:
    return read_data(DataSettings(images="images", labels="labels.csv"), root)


@pytest.fixture
def check(read: ReadData) -> DataCheck:
    return check_data(read, 384)


def test_counts(check: DataCheck) -> None:
    assert (check.images, check.unit, check.classes) == (46, "patients", ("ill", "well"))
    assert {name: column["images"] for name, column in check.by_class.items()} == {"ill": 23, "well": 23}
    assert sum(column[split] for column in check.by_class.values() for split in ("train", "val", "test")) == 46
    assert check.columns["format"] == {"JPEG": {"ill": 1}, "PNG": {"ill": 21, "well": 23}}
    assert check.columns["mode"] == {"L": {"ill": 21, "well": 23}, "RGB": {"ill": 1}}
    assert check.columns["bits"] == {"8": {"ill": 22, "well": 23}}
    assert check.columns["site"] == {"north": {"ill": 22}, "south": {"well": 23}}
    assert sum(check.sizes.values()) == 45


def test_defects(check: DataCheck) -> None:
    assert check.unreadable == {"ill/cut.png": "the file is truncated"}
    assert check.blank == ("well/blank.png",)
    assert check.tiny == ("ill/tiny.png",)
    assert [copies.paths for copies in check.duplicates] == [("ill/01.png", "well/copy.png")]
    assert [copies.paths for copies in check.near] == [("well/02.png", "well/near.png")]
    assert [copies.labels for copies in check.conflicts] == [("ill", "well")]
    assert len(check.leaks) == 1 and "ill/01.png (train), well/copy.png (test)" in check.leaks[0]


def test_shortcuts(check: DataCheck) -> None:
    suspected = {probe.name: probe.suspected for probe in check.probes}
    assert suspected["width, height, file bytes"] and suspected["site"]
    assert not suspected["format"] and "bits" not in suspected


def test_what_is_found_is_in_the_page(check: DataCheck, read: ReadData) -> None:
    html = render_check(check, read)
    assert html.count("<img") == 44 or html.count("<img") == 45
    for finding in findings(check):
        assert finding.title in html
    for path in ("ill/cut.png", "well/blank.png", "ill/tiny.png", "well/near.png"):
        assert path in html
    bare = render_check(check, read, pixels=False)
    assert "<img" not in bare and "data:" not in bare


def test_names_cannot_run_in_the_page(root: Path) -> None:
    save(picture(60), root / "images/well/<script>alert(1)<" / "x.png")
    read = read_data(DataSettings(images="images"), root)
    assert "<script>" not in render_check(check_data(read, 64), read)


def test_a_clean_data_set(tmp_path: Path) -> None:
    for number in range(30):
        save(picture(number), tmp_path / f"images/{'ab'[number // 15]}/{number}.bmp")
    read = read_data(DataSettings(images="images"), tmp_path)
    assert findings(check_data(read, 96)) == []


def test_several_labels_and_images_without_any(tmp_path: Path) -> None:
    lines = ["path,label,patient"]
    for number in range(24):
        save(picture(number), tmp_path / f"images/{number:02}.png")
        lines.append(f"{number:02}.png,{('a|b', 'a', 'b', '')[number % 4]},p{number // 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    settings = DataSettings(images="images", labels="labels.csv", task="multilabel", label_columns=None)
    (tmp_path / "flags.csv").write_text(
        "\n".join(["path,a,b", *(f"{number:02}.png,{number % 2},{number // 2 % 2}" for number in range(24))])
    )
    flags = settings.model_copy(update={"labels": "flags.csv", "label_columns": ("a", "b")})
    check = check_data(read_data(flags, tmp_path), 96)
    assert {name: column["images"] for name, column in check.by_class.items()} == {"a": 12, "b": 12, "": 6}
    assert [probe.images for probe in check.probes] == [24, 24]
