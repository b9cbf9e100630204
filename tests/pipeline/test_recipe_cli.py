"""`fpt data recipe`: a study from a download, warnings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import yaml
from command_line import Fpt
from recipe_downloads import BUILDERS

from pipeline.doc_blocks import with_block
from pipeline.recipe_tables import BEGIN, END, recipes_page
from schemas.recipe_rows import RECIPES

PAGE = Path(__file__).parents[2] / "docs/recipes.md"


def test_the_page_is_generated_from_the_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_block(text, BEGIN, END, recipes_page()) == text


def test_every_recipe_is_listed(tmp_path: Path, fpt: Fpt) -> None:
    out, _ = fpt("data", "recipe", "--list", cwd=tmp_path)
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == list(RECIPES)
    assert [row[3].strip() for row in rows if "covid" in row[0]] == ["1,823"]


def test_a_study_is_made_and_compared(tmp_path: Path, fpt: Fpt) -> None:
    BUILDERS["isic-2016"](tmp_path / "download")
    out, err = fpt("data", "recipe", "isic-2016", "--source", "download", "--set", "train.epochs=2", cwd=tmp_path)
    assert "Warning: differs from the published: 2 images in train instead of 900." in err
    assert "malignant" in out
    study = tmp_path / "isic-2016"
    params = yaml.safe_load((study / "params.yaml").read_text())
    assert params["data"]["images"] == str(tmp_path / "download")
    assert (params["data"]["labels"], params["data"]["split_column"]) == ("labels.csv", "split")
    assert (params["method"], params["train"]["lr"], params["train"]["epochs"]) == ("fpt+", 0.005, 2)
    assert params["features"]["normalisation"] == "dataset"
    assert (study / ".git").is_dir()
    assert (study / ".dvc").is_dir()
    _, err = fpt("data", "recipe", "isic-2016", "--source", "download", cwd=tmp_path, code=2)
    assert "overwrites nothing" in err


def test_published_few_shot_lists(tmp_path: Path, fpt: Fpt) -> None:
    BUILDERS["medfmc-colon"](tmp_path / "download")
    lists = tmp_path / "download/MedFMC"
    lists.mkdir()
    (lists / "colon_1-shot_train_exp2.txt").write_text("0.png 0\n2.png 1\n")
    (lists / "colon_1-shot_val_exp2.txt").write_text("1.png 0\n")
    words = ("data", "recipe", "medfmc-colon", "--source", "download", "--shots", 1)
    _, err = fpt(*words, cwd=tmp_path, code=2)
    assert "colon_1-shot_train_exp1.txt" in err and not (tmp_path / "medfmc-colon").exists()
    fpt(*words, "--draw", 2, cwd=tmp_path)
    study = tmp_path / "medfmc-colon"
    found = yaml.safe_load((study / "params.yaml").read_text())["data"]["split_files"]
    assert found == {**{one: str(lists / f"colon_1-shot_{one}_exp2.txt") for one in ("train", "val")}, "test": "rest"}
    deps = yaml.safe_load((study / "dvc.yaml").read_text())["stages"]["prepare"]["deps"]
    assert deps[2:] == ["${data.split_files.train}", "${data.split_files.val}"]


def test_half_a_download_makes_nothing(tmp_path: Path, fpt: Fpt) -> None:
    BUILDERS["busi"](tmp_path / "download")
    for path in (tmp_path / "download").rglob("malignant*.png"):
        path.unlink()
    _, err = fpt("data", "recipe", "busi", "--source", "download", cwd=tmp_path, code=2)
    assert "not a complete download of BUSI: 1 part missing" in err
    assert "images of 'malignant'" in err
    assert not (tmp_path / "busi").exists()
    _, err = fpt("data", "recipe", "busi", cwd=tmp_path, code=2)
    assert "--source is missing" in err
    _, err = fpt("data", "recipe", "busi", "--source", ".", cwd=tmp_path, code=2)
    assert "inside of the download" in err
    assert not (tmp_path / "busi").exists()
    _, err = fpt("data", "recipe", "bussi", "--source", "download", cwd=tmp_path, code=2)
    assert "did you mean 'busi'?" in err


def test_images_of_an_archive_are_removed_with_a_study_that_fails(tmp_path: Path, fpt: Fpt) -> None:
    BUILDERS["breastmnist"](tmp_path / "download")
    (tmp_path / "study").mkdir()
    path = tmp_path / "download/breastmnist.npz"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"test_labels", b"othe_labels"))
    words = ("data", "recipe", "breastmnist", "--source", "download", "--study", "study")
    _, err = fpt(*words, cwd=tmp_path, code=2)
    assert "is not a file of BreastMNIST" in err
    assert list((tmp_path / "study").iterdir()) == []
    path.write_bytes(data)
    fpt(*words, cwd=tmp_path)
    assert len(list((tmp_path / "study/images").rglob("*.png"))) == 6
