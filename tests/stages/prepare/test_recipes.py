"""Recipes on miniature downloads: labels, patients and splits, incomplete downloads, and published counts."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipe_downloads import BUILDERS, picture, table

from schemas.errors import DataError
from schemas.parse import parse_settings
from schemas.recipe_rows import RECIPES
from schemas.recipes import Arrays, Paths
from stages.prepare.dataset_listing import Listing, read_listing
from stages.prepare.recipes.counts import count_images, differences
from stages.prepare.recipes.readers import Found
from stages.prepare.recipes.study import data_settings, read_download, write_labels


def built(root: Path, name: str) -> Path:
    """Build a miniature download."""
    BUILDERS[name](root / "download")
    return root / "download"


def study_of(root: Path, name: str) -> tuple[Found, Listing]:
    """Read a miniature download, and list the study that comes of it as `fpt prepare` does."""
    source, study = built(root, name), root / "study"
    study.mkdir()
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    found = read_download(RECIPES[name], source, study)
    write_labels(study, RECIPES[name], found.images)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    settings = parse_settings({"data": data_settings(RECIPES[name], source)})
    return found, read_listing(settings.data, study)


@pytest.mark.parametrize("name", RECIPES)
def test_a_download_becomes_what_prepare_reads(tmp_path: Path, name: str) -> None:
    found, listing = study_of(tmp_path, name)
    recipe = RECIPES[name]
    assert found.images
    assert [(item.path, item.label, item.group, item.split) for item in listing.items] == [
        (image.path, image.label, image.group, image.split) for image in found.images
    ]
    assert all((listing.images / item.path).is_file() for item in listing.items)
    labels = {label for (_, label), _ in count_images(found.images, recipe.task).items() if label}
    assert labels == set(recipe.classes)
    assert {image.split is not None for image in found.images} == {recipe.has_splits}
    assert any(image.group is not None for image in found.images) == bool(recipe.group)


@pytest.mark.parametrize("name", RECIPES)
def test_a_part_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    source, recipe = built(tmp_path, name), RECIPES[name]
    if isinstance(recipe.reading, Paths):
        gone = recipe.classes[-1]
        removed = [source / one.path for one in read_download(recipe, source, tmp_path).images if one.label == gone]
        expected = f"images of '{gone}'"
    else:
        suffixes = {".npz"} if isinstance(recipe.reading, Arrays) else {".csv", ".xlsx", ".txt"}
        removed = [path for path in source.rglob("*") if path.suffix in suffixes]
        expected = f"{name}_224.npz" if isinstance(recipe.reading, Arrays) else min(path.name for path in removed)
    for path in removed:
        path.unlink()
    with pytest.raises(DataError, match=f"not a complete download of {re.escape(recipe.title)}") as caught:
        read_download(recipe, source, tmp_path)
    assert expected in str(caught.value)
    assert recipe.source in str(caught.value)


def test_every_missing_image_is_listed(tmp_path: Path) -> None:
    source = built(tmp_path, "ddr")
    folder = source / "DDR-dataset/DR_grading"
    (folder / "train/train-0.jpg").unlink()
    (folder / "test/test-3.jpg").unlink()
    (folder / "valid.txt").unlink()
    with pytest.raises(DataError) as caught:
        read_download(RECIPES["ddr"], source, tmp_path)
    for part in (
        "3 parts missing",
        "DR_grading/train/train-0.jpg",
        "DR_grading/test/test-3.jpg",
        "DR_grading/valid.txt",
    ):
        assert part in str(caught.value)


def test_eyes_and_lesions_stay_together(tmp_path: Path) -> None:
    found, _ = study_of(tmp_path / "messidor", "messidor-2")
    groups = {Path(image.path).name: image.group for image in found.images}
    assert groups["a_PP.png"] == groups["b_PP.png"]
    assert groups["IM1.JPG"] not in (None, groups["a_PP.png"])
    assert [image.label for image in found.images] == ["proliferative", "mild", "severe", "no DR", "moderate"]
    assert found.left_out == {"without a label that the recipe uses": 1, "not in messidor_data.csv": 1}
    found, listing = study_of(tmp_path / "isic", "isic-2018")
    lesions = Counter(image.group for image in found.images if image.split == "train")
    assert sorted(lesions.values()) == [1, 1, 1, 1, 1, 2]
    assert {image.group for image in found.images if image.split != "train"} == {None}
    assert (listing.group_column, listing.unit) == ("lesion", "groups")


def test_a_side_without_a_label_is_left_out(tmp_path: Path) -> None:
    found, _ = study_of(tmp_path, "cmmd")
    assert [(image.label, image.group) for image in found.images] == [
        ("benign", "D1-0001"),
        ("malignant", "D1-0001"),
        ("malignant", "D2-0002"),
    ]
    assert found.left_out.total() == 1


def test_masks_are_no_images(tmp_path: Path) -> None:
    for name in ("mini-ddsm", "busi"):
        found, _ = study_of(tmp_path / name, name)
        assert len(found.images) == 6
        assert not any("mask" in image.path.lower() for image in found.images)


def test_arrays_are_written_as_images(tmp_path: Path) -> None:
    found, listing = study_of(tmp_path, "pathmnist")
    assert len(found.images) == 3 * 9
    written = np.asarray(Image.open(listing.images / "val/000004.png"))
    assert written.shape == (64, 64, 3)
    assert np.unique(written).tolist() == [4]
    labels = {image.path: image.label for image in study_of(tmp_path / "chest", "chestmnist")[0].images}
    assert labels["train/000000.png"] == ""
    assert labels["test/000002.png"] == "atelectasis|cardiomegaly"


def test_a_pickle_in_an_archive_is_refused(tmp_path: Path) -> None:
    source = built(tmp_path, "breastmnist")
    arrays = dict(np.load(source / "breastmnist.npz"))
    arrays["train_labels"] = np.array([[{}], [{}]], dtype=object)
    np.savez(source / "breastmnist.npz", **arrays)
    with pytest.raises(DataError, match="not a file of BreastMNIST"):
        read_download(RECIPES["breastmnist"], source, tmp_path)


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    source = built(tmp_path, "breastmnist")
    arrays = dict(np.load(source / "breastmnist.npz"))
    arrays["test_images"] = arrays["test_images"].astype(np.uint16)
    np.savez(source / "breastmnist.npz", **arrays)
    with pytest.raises(DataError, match="test_images is an array of uint16"):
        read_download(RECIPES["breastmnist"], source, tmp_path)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    source = built(tmp_path, "breastmnist")
    data = (source / "breastmnist.npz").read_bytes()
    (source / "breastmnist.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="Download it again"):
        read_download(RECIPES["breastmnist"], source, tmp_path)


def test_an_unknown_label_another_table_and_two_copies_are_errors(tmp_path: Path) -> None:
    source = built(tmp_path / "odir", "odir")
    text = (source / "full_df.csv").read_text()
    (source / "full_df.csv").write_text(text.replace("['O']", "['X']", 1))
    with pytest.raises(DataError, match=r"\['X'\]"):
        read_download(RECIPES["odir"], source, tmp_path)
    (source / "full_df.csv").write_text(text.replace("filename", "file"))
    with pytest.raises(DataError, match="no column 'filename'"):
        read_download(RECIPES["odir"], source, tmp_path)
    (source / "full_df.csv").write_text(text + "8,cut\n")
    with pytest.raises(DataError, match=r"1 row of .* fewer cells"):
        read_download(RECIPES["odir"], source, tmp_path)
    shutil.copytree(source, source / "copy")
    with pytest.raises(DataError, match="2 times"):
        read_download(RECIPES["odir"], source, tmp_path)


def test_one_hot_labels_have_one_label(tmp_path: Path) -> None:
    source = built(tmp_path, "isic-2018")
    path = next(source.rglob("*Test_GroundTruth.csv"))
    path.write_text(path.read_text().replace("1.0", "0.0", 1))
    with pytest.raises(DataError, match="not exactly one label is 1"):
        read_download(RECIPES["isic-2018"], source, tmp_path)


def test_a_source_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--source is the folder"):
        read_download(RECIPES["busi"], tmp_path / "nothing", tmp_path)


def test_counts_are_compared_with_the_published_ones() -> None:
    recipe = RECIPES["isic-2016"]
    counts = {("train", ""): 900, ("train", "benign"): 727, ("train", "malignant"): 173}
    counts |= {("test", ""): 379, ("test", "benign"): 304, ("test", "malignant"): 75}
    assert differences(recipe, counts) == []
    counts["test", "malignant"] -= 1
    assert differences(recipe, counts) == ["differs from the published: 74 images of 'malignant' in test instead of 75"]
    counts = {("", "COVID-19"): 536, ("", "normal"): 668, ("", "viral pneumonia"): 619, ("", ""): 1824}
    assert differences(RECIPES["covid-cxr"], counts) == ["differs from the published: 1,824 images instead of 1,823"]
    # Counts of all splits together.
    grades = RECIPES["ddr"].published[0]
    counts = {(split, name): number for name, number in grades.labels.items() for split in ("train",)}
    counts |= {("train", ""): grades.images - 1, ("val", ""): 1}
    assert differences(RECIPES["ddr"], counts) == []
    assert differences(RECIPES["mini-ddsm"], {}) == []


@pytest.mark.parametrize("name", RECIPES)
def test_published_counts_add_up(name: str) -> None:
    recipe = RECIPES[name]
    for published in recipe.published:
        assert set(published.labels) <= set(recipe.classes)
        if published.labels and recipe.task != "multilabel":
            assert sum(published.labels.values()) == published.images
    assert recipe.has_splits or all(published.split is None for published in recipe.published)


def test_counts_are_per_split_and_label(tmp_path: Path) -> None:
    counts = count_images(study_of(tmp_path, "ddr")[0].images, "multiclass")
    assert counts["train", ""] == 5
    assert counts["val", "mild"] == 1


def test_names_with_capitals_and_folders_are_found(tmp_path: Path) -> None:
    source = tmp_path / "download"
    picture(source / "images" / "A.PNG")
    table(source / "MESSIDOR_DATA.CSV", [("image_id", "adjudicated_dr_grade"), ("IMAGES/a.png", 3)])
    table(source / "messidor-2.csv", [("left", "right"), ("a.png", "")], ";")
    (image,) = read_download(RECIPES["messidor-2"], source, tmp_path).images
    assert (image.path, image.label, image.group) == ("images/A.PNG", "severe", "a")
