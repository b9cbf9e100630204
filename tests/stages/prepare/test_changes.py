"""What `prepare` says about changes since the last run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prepared import make, table

from schemas.data_settings import DataSettings
from stages.prepare import prepare

Rows = list[dict[str, str]]


@pytest.fixture
def rows(study: Path) -> Rows:
    """Twenty images with given splits."""
    images = study / "data/images"
    return [
        {
            "path": path.relative_to(images).as_posix(),
            "label": path.parent.name,
            "patient": f"{path.parent.name}{path.stem}",
            "split": ("train", "train", "train", "val", "test")[int(path.stem) % 5],
        }
        for path in sorted(images.rglob("*.png"))
    ]


def changes(study: Path, rows: Rows) -> tuple[str, ...]:
    # As DVC does before it runs a stage.
    shutil.rmtree(study / "out", ignore_errors=True)
    data = DataSettings(labels=table(study, rows))
    return prepare(data, study, study / "out", history=study / ".fpt/splits").changes


def test_the_first_run_and_an_equal_one(study: Path, rows: Rows) -> None:
    assert changes(study, rows) == ()
    assert changes(study, rows) == ("Nothing changed since the last `fpt prepare`.",)


def test_each_kind_of_change(study: Path, rows: Rows) -> None:
    images = study / "data/images"
    changes(study, rows)
    (images / "benign/0.png").rename(images / "benign/renamed.png")
    rows[0]["path"] = "benign/renamed.png"
    first, second = changes(study, rows)
    assert first == "Since the last `fpt prepare`: 1 image renamed."
    assert second == "To compute: nothing: every split has the same images and labels."
    rows[1]["label"] = "malignant"
    first, second = changes(study, rows)
    assert first == "Since the last `fpt prepare`: 1 image relabelled."
    assert second == "To compute: training, evaluation."
    make(images / "benign/4.png", 5000)
    first, second = changes(study, rows)
    assert first == "Since the last `fpt prepare`: 1 image edited."
    assert second.startswith("To compute: features of up to 1 image (those that the cache lacks), evaluation; training")
    make(images / "benign/new.png", 5001)
    rows.append({"path": "benign/new.png", "label": "benign", "patient": "new", "split": "train"})
    (images / "malignant/0.png").unlink()
    del rows[10]
    first, second = changes(study, rows)
    assert first == "Since the last `fpt prepare`: 1 image added, 1 image removed."
    assert second == "To compute: features of up to 1 image (those that the cache lacks), training, evaluation."
    rows[2]["patient"], rows[3]["split"] = "other", "train"
    first, _ = changes(study, rows)
    assert first == "Since the last `fpt prepare`: 1 image with another patient, 1 image in another split."


def test_copies(study: Path, rows: Rows) -> None:
    changes(study, rows)
    shutil.copy(study / "data/images/benign/0.png", study / "data/images/benign/copy.png")
    rows.append({**rows[0], "path": "benign/copy.png"})
    assert changes(study, rows)[0] == "Since the last `fpt prepare`: 1 image added."
    del rows[0]
    assert changes(study, rows)[0] == "Since the last `fpt prepare`: 1 image removed."


def test_other_classes(study: Path, rows: Rows) -> None:
    changes(study, rows)
    for row in rows:
        row["label"] = {"malignant": "bad"}.get(row["label"], row["label"])
    first, second = changes(study, rows)
    assert "10 images relabelled" in first and "classes bad, benign (were benign, malignant)" in first
    assert "training" in second
