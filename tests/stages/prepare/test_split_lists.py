"""Splits from text files that list images, such as those of few-shot benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pictures import picture, save
from recipe_downloads import BUILDERS, table

from schemas.errors import DataError, SettingsError
from schemas.manifest import Manifest, PrepareResult
from schemas.parse import parse_settings
from schemas.recipe_rows import RECIPES
from stages.data_check.check import check_data, read_data
from stages.data_check.repair import plan_repair
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.prepare.dataset_listing import read_listing
from stages.prepare.recipes.study import data_settings, find_lists, read_download, write_labels

LISTS = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Twelve images in folders of two classes, and lists of nine of them in the ways that are in use."""
    for number in range(12):
        save(picture(number), tmp_path / f"images/{'ab'[number % 2]}/{number:02}.png")
    save(picture(20), tmp_path / "images/a/with blank (1).png")
    (tmp_path / "train.txt").write_text("00.png 1,0,0\r\n01.png 0,1,0\r\n\r\nb/03.png 1\nwith blank (1).png\n")
    (tmp_path / "val.txt").write_text("./a/04.png\nb\\05.png 0")
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbf06.png\n07.png,1\n08.png\n")
    return tmp_path


def run(root: Path, **data: Any) -> tuple[Manifest, PrepareResult]:
    settings = parse_settings({"data": {"images": "images", "split_files": LISTS, **data}})
    result = prepare(settings.data, root, root / "outputs/manifest", history=root / ".fpt/splits")
    return read_manifest(root / "outputs/manifest/manifest.parquet"), result


def names(manifest: Manifest, split: Any) -> list[str]:
    return [row.path.rpartition("/")[2].removesuffix(".png") for row in manifest.of(split)]


def test_lists_are_the_splits(study: Path) -> None:
    manifest, result = run(study)
    assert names(manifest, "train") == ["00", "with blank (1)", "01", "03"]
    assert (names(manifest, "val"), names(manifest, "test")) == (["04", "05"], ["06", "08", "07"])
    assert "4 images in no list left out." in result.notes
    manifest, result = run(study, split_files={**LISTS, "test": "rest"})
    assert names(manifest, "train") == ["00", "with blank (1)", "01", "03"] and len(names(manifest, "test")) == 7
    assert not any("left out" in note or "known images keep" in note for note in result.notes)


def test_without_a_list_of_validation_images_they_are_drawn(study: Path) -> None:
    manifest, _ = run(study, split_files={"train": "rest", "test": "test.txt"})
    assert names(manifest, "test") == ["06", "08", "07"]
    assert names(manifest, "val") and len(names(manifest, "train") + names(manifest, "val")) == 10


def test_a_table_whose_split_column_the_lists_replace(study: Path) -> None:
    rows = [(f"{'ab'[n % 2]}/{n:02}.png", "" if n == 8 else "xy"[n % 2], f"p{n}", "test") for n in range(9)]
    table(study / "labels.csv", [("path", "label", "patient", "split"), *rows])
    (study / "train.txt").write_text("00.png\n01.png\n02.png\n03.png\n")
    manifest, _ = run(study, labels="labels.csv", unlabelled="allow")
    assert names(manifest, "train") == ["00", "02", "01", "03"] and names(manifest, "test") == ["06", "07"]
    assert [row.path for row in manifest.unlabelled] == ["a/08.png"], "listed, but without a label"


def test_leaks_between_lists_are_refused(study: Path) -> None:
    rows = [(f"{'ab'[n % 2]}/{n:02}.png", "xy"[n % 2], f"p{n // 4}") for n in range(12)]
    table(study / "labels.csv", [("path", "label", "patient"), *rows])
    (study / "train.txt").write_text("00.png\n01.png\n")
    (study / "val.txt").write_text("02.png\n03.png\n")
    with pytest.raises(DataError, match=r"patient 'p0': a/00.png .train., a/02.png .val."):
        run(study, labels="labels.csv")
    assert len(run(study, labels="labels.csv", allow_leaks=["patient"])[0].rows) == 7
    data = parse_settings({"data": {"images": "images", "labels": "labels.csv", "split_files": LISTS}}).data
    read = read_data(data, study)
    assert any("patient 'p0'" in leak for leak in check_data(read, 64).leaks)
    with pytest.raises(DataError, match="splits are those of the lists"):
        plan_repair(read)


def test_wrong_lists(study: Path) -> None:
    (study / "val.txt").write_text("00.png\n05.png\n99.png\n")
    with pytest.raises(DataError, match=r"1 line of data.split_files without an image") as caught:
        run(study)
    assert "val.txt, line 3: 99.png" in caught.value.cause
    (study / "val.txt").write_text("00.png\n05.png\n")
    with pytest.raises(DataError, match=r"1 image of data.split_files in two splits") as caught:
        run(study)
    assert "a/00.png: train (train.txt, line 1); val (val.txt, line 1)" in caught.value.cause
    save(picture(30), study / "images/b/04.png")
    (study / "val.txt").write_text("04.png\n")
    with pytest.raises(DataError, match=r"2 images of data.images are called '04.png'"):
        run(study)
    (study / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt"):
        run(study)


@pytest.mark.parametrize(
    "data",
    [
        {"split_files": {"train": "rest"}},
        {"split_files": {"train": "rest", "val": "rest", "test": "a.txt"}},
        {"split_files": {"training": "a.txt"}},
        {"split_files": {}},
        {"split_files": {"train": "a.txt"}, "labels": "labels.csv", "split_column": "split"},
        {"split_files": {"train": "a.txt"}, "labels": "t.csv", "site_column": "s", "test_sites": ["x"]},
    ],
)
def test_settings_that_contradict(data: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="split_files"):
        parse_settings({"data": data})


def test_the_lists_of_a_recipe(tmp_path: Path) -> None:
    """The few-shot lists of MedFMC: a name and its labels per line; what they do not list is tested."""
    source, study, recipe = tmp_path / "download", tmp_path / "study", RECIPES["medfmc-chest"]
    BUILDERS["medfmc-chest"](source)
    study.mkdir()
    write_labels(study, recipe, read_download(recipe, source, study).images)
    with pytest.raises(DataError, match="not a complete download of MedFMC ChestDR: 2 parts missing") as caught:
        find_lists(recipe, source, 1, 3)
    assert "chest_1-shot_train_exp3.txt" in caught.value.cause
    flags = ",".join("1" * len(recipe.classes))
    (source / "lists").mkdir()
    (source / "lists/chest_1-shot_train_exp3.txt").write_text(f"2.png {flags}\n")
    (source / "lists/chest_1-shot_val_exp3.txt").write_text(f"3.png {flags}\n")
    settings = {**data_settings(recipe, source), "split_files": find_lists(recipe, source, 1, 3)}
    listing = read_listing(parse_settings({"data": settings}).data, study)
    assert [(item.path[-5:], item.split) for item in listing.items] == [
        ("0.png", "test"), ("1.png", "test"), ("2.png", "train"), ("3.png", "val")
    ]  # fmt: skip
    with pytest.raises(DataError, match="No few-shot lists of BUSI are known"):
        find_lists(RECIPES["busi"], source, 1, 1)
