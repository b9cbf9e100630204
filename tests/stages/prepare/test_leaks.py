"""No leak passes: content, patient and near-duplicates in two splits are errors unless they are allowed by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pictures import brightened, picture, recompressed, save
from prepared import fails, run, table

from stages.groups import cluster_of
from stages.manifest import read_manifest
from stages.prepare.folds import draw_folds

SPLITS = ("train", "train", "train", "val", "test")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two classes of fifteen pictures, without patients."""
    for number in range(30):
        save(picture(number), tmp_path / f"data/images/{'ab'[number % 2]}/{number:02}.png")
    return tmp_path


def rows(study: Path) -> list[dict[str, str]]:
    """A table with a patient of its own and a given split for each image."""
    images = study / "data/images"
    return [
        {
            "path": path.relative_to(images).as_posix(),
            "label": path.parent.name,
            "patient": f"p{path.stem}",
            "split": SPLITS[at % 5],
        }
        for at, path in enumerate(sorted(images.rglob("*.png")))
    ]


def test_near_duplicates_in_two_given_splits(study: Path) -> None:
    images = study / "data/images"
    given = rows(study)
    save(recompressed(picture(0)), images / "a/copy.png")
    save(brightened(picture(2)), images / "a/bright.png")
    given += [
        {"path": "a/copy.png", "label": "a", "patient": "x", "split": "test"},
        {"path": "a/bright.png", "label": "a", "patient": "y", "split": "train"},
    ]
    text = fails(study, labels=table(study, given))
    assert "1 leak" in text
    assert "nearly the same" in text and "a/00.png (train), a/copy.png (test)" in text
    assert "data.allow_leaks: [near]" in text
    manifest, result = run(study, labels="labels.csv", allow_leaks=("near",))
    assert result.leaks == {"near": 1} and any("near-duplicate pair in several splits" in note for note in result.notes)
    assert {row.path: row.split for row in manifest.rows} == {row["path"]: row["split"] for row in given}
    assert result.near == 0, "allowed near-duplicates make no groups"


def test_one_patient_in_two_given_splits(study: Path) -> None:
    given = rows(study)
    given[0]["patient"] = given[4]["patient"]
    text = fails(study, labels=table(study, given))
    assert f"patient {given[4]['patient']!r}" in text and "data.allow_leaks: [patient]" in text
    fails(study, labels="labels.csv", allow_leaks=("near", "content"))
    _, result = run(study, labels="labels.csv", allow_leaks=("patient",))
    assert result.leaks == {"patient": 1}


def test_one_content_in_two_given_splits(study: Path) -> None:
    given = rows(study)
    shutil.copy(study / "data/images" / given[0]["path"], study / "data/images/a/copy.png")
    given.append({"path": "a/copy.png", "label": "a", "patient": "x", "split": "test"})
    text = fails(study, labels=table(study, given))
    assert "the content of" in text and "data.allow_leaks: [content]" in text
    manifest, result = run(study, labels="labels.csv", allow_leaks=("content",))
    assert result.leaks == {"content": 1} and manifest.allow_leaks == ("content",)
    again, second = run(study, labels="labels.csv", allow_leaks=("content",))
    assert again == manifest and second.moved == {}


def test_an_allowed_leak_does_not_hide_another(study: Path) -> None:
    given = rows(study)
    given[0]["patient"] = given[4]["patient"]
    save(recompressed(picture(int(Path(given[1]["path"]).stem))), study / "data/images/a/copy.png")
    given.append({"path": "a/copy.png", "label": "a", "patient": "x", "split": "test"})
    text = fails(study, labels=table(study, given), allow_leaks=("patient",))
    assert "1 leak" in text and "nearly the same" in text


def test_a_leak_through_a_third_image(study: Path) -> None:
    given = rows(study)
    save(recompressed(picture(0)), study / "data/images/a/copy.png")
    test = next(row for row in given if row["split"] == "test")
    given.append({"path": "a/copy.png", "label": "a", "patient": test["patient"], "split": ""})
    text = fails(study, labels=table(study, given))
    assert "connected" in text and "a/00.png (train)" in text and f"{test['path']} (test)" in text


def test_leaks_with_some_splits_drawn(study: Path) -> None:
    given = [row for row in rows(study) if row["split"] != "val"]
    given[0]["patient"] = next(row["patient"] for row in given if row["split"] == "test")
    manifest, _ = run(study, labels=table(study, given), allow_leaks=("patient",))
    split_of = {row.path: row.split for row in manifest.rows}
    assert all((split_of[row["path"]] == "test") == (row["split"] == "test") for row in given)
    assert "val" in split_of.values()


def test_near_duplicates_stay_together_in_drawn_splits_and_folds(study: Path) -> None:
    images = study / "data/images"
    copies = {}
    for number in range(0, 12, 2):
        copies[f"a/{number:02}.png"] = f"a/copy{number}.png"
        save(recompressed(picture(number)), images / f"a/copy{number}.png")
    for seed in range(4):
        manifest, result = run(study, seed=seed)
        assert result.near == 12
        split_of = {row.path: row.split for row in manifest.rows}
        assert all(split_of[one] == split_of[other] for one, other in copies.items())
    for fold in draw_folds(manifest, 3, 0.2, 0):
        split_of = {row.path: row.split for row in fold.rows}
        assert all(split_of[one] == split_of[other] for one, other in copies.items())
    clusters = cluster_of(read_manifest(study / "outputs/manifest/manifest.parquet"))
    assert all(clusters[one] == clusters[other] for one, other in copies.items())


def test_many_images_that_look_alike_are_a_warning(study: Path) -> None:
    _, result = run(study)
    assert not any("nearly the same" in note for note in result.notes)
    for number in range(1, 13):
        save(
            picture(0).point(lambda value, add=number: min(255, value + add)),
            study / f"data/images/a/frame{number}.png",
        )
    _, result = run(study)
    assert any("13 images are nearly the same" in note for note in result.notes)
    _, result = run(study, allow_leaks=["near"])
    assert not any("are nearly the same" in note for note in result.notes)
