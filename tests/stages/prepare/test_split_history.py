"""Known images keep their split when images or patients are added or removed, and `--redraw` draws again."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.data_settings import DataSettings
from schemas.errors import DataError, ManifestError
from schemas.manifest import Manifest, PrepareResult
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.prepare.exports import check_free, write_splits
from stages.prepare.split_history import manifest_copy


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for index, label in enumerate(("ill", "well")):
        for number in range(45):
            draw(tmp_path / f"data/images/{label}/{number:02}.png", 1000 * index + number)
    return tmp_path


def run(study: Path, redraw: bool = False, **settings: object) -> tuple[Manifest, PrepareResult]:
    # As DVC does before it runs a stage.
    shutil.rmtree(study / "outputs", ignore_errors=True)
    data = DataSettings.model_validate(settings)
    result = prepare(data, study, study / "outputs/manifest", history=study / ".fpt/splits", redraw=redraw)
    return read_manifest(study / "outputs/manifest/manifest.parquet"), result


def splits(manifest: Manifest) -> dict[str, str]:
    return {row.id: row.split for row in manifest.rows}


def table(study: Path, rows: list[dict[str, str]], name: str = "labels.csv") -> str:
    with (study / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def pairs(study: Path) -> list[dict[str, str]]:
    """A table with two images per patient."""
    images = study / "data/images"
    return [
        {
            "path": path.relative_to(images).as_posix(),
            "label": path.parent.name,
            "patient": f"{path.parent.name}{int(path.stem) // 2}",
        }
        for path in sorted(images.rglob("*.png"))
    ]


def test_one_image_more_or_less_moves_no_other(study: Path) -> None:
    before, first = run(study)
    assert (first.known, first.moved) == (0, {})
    draw(study / "data/images/ill/new.png", 5000)
    after, result = run(study)
    assert splits(before).items() <= splits(after).items()
    assert (result.known, result.moved) == (90, {})
    (study / "data/images/ill/new.png").unlink()
    (study / "data/images/ill/07.png").rename(study / "away.png")
    less, _ = run(study)
    assert splits(less).items() <= splits(before).items()
    (study / "away.png").rename(study / "data/images/ill/back.png")
    again, _ = run(study)
    assert splits(again) == splits(before), "an image that comes back has its old split"


def test_new_images_fill_the_shares(study: Path) -> None:
    run(study)
    for number in range(90):
        draw(study / f"data/images/ill/more{number}.png", 7000 + number)
    manifest, result = run(study)
    assert result.moved == {}
    counts = {split: sum(row.split == split and row.label == "ill" for row in manifest.rows) for split in result.counts}
    assert counts == {"train": 81, "val": 27, "test": 27}


def test_a_fresh_draw_is_asked_for_by_name(study: Path) -> None:
    before, _ = run(study)
    for number in range(30):
        draw(study / f"data/images/ill/more{number}.png", 7000 + number)
    grown, _ = run(study)
    fresh, result = run(study, redraw=True)
    changed = sum(splits(grown)[one] != split for one, split in splits(fresh).items())
    assert changed == sum(result.moved.values()) > 0
    assert splits(run(study)[0]) == splits(fresh), "the fresh draw is the one that is kept from now on"
    other, result = run(study, seed=1)
    changed = sum(splits(fresh)[one] != split for one, split in splits(other).items())
    assert changed == sum(result.moved.values()) > 0, "another seed changes splits, and that is counted"
    assert splits(run(study)[0]) == splits(fresh), "each seed has its own draw"
    assert splits(before) != splits(fresh)


def test_a_new_patient_column_moves_no_image_into_the_test(study: Path) -> None:
    before, _ = run(study)
    manifest, result = run(study, labels=table(study, pairs(study)))
    assert result.unit == "patients"
    assert set(result.moved) <= {"test -> train", "test -> val", "val -> train"} and result.moved
    where: dict[str, set[str]] = {}
    for row in manifest.rows:
        where.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in where.values())
    known = splits(before)
    assert all(known[row.id] == "test" for row in manifest.of("test"))


def test_a_known_patient_keeps_the_split_with_other_images(study: Path) -> None:
    rows = pairs(study)
    before, _ = run(study, labels=table(study, rows))
    patient = next(row.group for row in before.of("test"))
    draw(study / "data/images/well/new.png", 6000)
    gone = [row for row in rows if row["patient"] != patient]
    new = {"path": "well/new.png", "label": "well", "patient": patient}
    after, _ = run(study, labels=table(study, [*gone, new]))
    assert next(row.split for row in after.rows if row.path == "well/new.png") == "test"


def test_a_gap_is_filled_by_a_new_image_first(study: Path) -> None:
    before, _ = run(study)
    for row in before.of("test"):
        if row.label == "ill":
            (study / "data/images" / row.path).unlink()
    manifest, result = run(study)
    assert sum(result.moved.values()) == 1, "one image moves: ill would be missing in the test"
    assert sum(row.label == "ill" for row in manifest.of("test")) == 1
    assert set(result.moved) == {"val -> test"}, "rather one of val than one that was trained on"
    shutil.rmtree(study / ".fpt")
    shutil.rmtree(study / "data/images/ill")
    for number in range(45):
        draw(study / f"data/images/ill/{number:02}.png", number)
    before, _ = run(study)
    for row in before.of("test"):
        if row.label == "ill":
            (study / "data/images" / row.path).unlink()
    draw(study / "data/images/ill/new.png", 5000)
    manifest, result = run(study)
    assert result.moved == {}
    assert [row.path for row in manifest.of("test") if row.label == "ill"] == ["ill/new.png"]


def test_a_damaged_memory_is_refused_and_drawn_again(study: Path) -> None:
    run(study)
    file = next((study / ".fpt/splits").glob("*.known.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ManifestError, match="--redraw"):
        run(study)
    run(study, redraw=True)
    assert run(study)[1].known == 90


def test_the_copy_of_the_manifest(study: Path) -> None:
    manifest, _ = run(study)
    assert read_manifest(manifest_copy(study / ".fpt/splits", DataSettings())) == manifest


def test_summary_and_manifest_do_not_depend_on_what_is_known(study: Path) -> None:
    run(study)
    first = {file.name: file.read_bytes() for file in (study / "outputs/manifest").iterdir()}
    run(study)
    assert {file.name: file.read_bytes() for file in (study / "outputs/manifest").iterdir()} == first


def odd_names(study: Path) -> None:
    for number, name in enumerate(
        ["=1+1.png", "-x.png", "'=y.png", " blank.png ", "a\\b.png", "new\nline.png", 'q".png']
    ):
        draw(study / "plain.png", 9000 + number)
        (study / "plain.png").rename(study / "data/images/ill" / name)
    for folder in ("=SUM(A1)", "-1"):
        for number in range(5):
            draw(study / f"data/images/{folder}/{number}.png", 9100 + 10 * len(folder) + number)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_split_as_a_table_that_grows(study: Path, grouped: bool) -> None:
    odd_names(study)
    labels = table(study, pairs_with_odd(study)) if grouped else None
    before, result = run(study, labels=labels)
    data = DataSettings(labels=labels)
    write_splits(before, result, data, study / "splits.csv")
    text = (study / "splits.csv").read_text()
    assert text.splitlines()[0].replace('"', "") == "path,label,patient,split"
    assert not any(cell.startswith(("=", "-")) for row in csv.reader(text.splitlines()) for cell in row)
    shutil.rmtree(study / ".fpt")
    after, result = run(study, labels="splits.csv")
    assert after == before
    draw(study / "data/images/well/new.png", 6000)
    with (study / "splits.csv").open("a") as file:
        file.write('"well/new.png","well","",""\n')
    grown, _ = run(study, labels="splits.csv")
    assert splits(before).items() <= splits(grown).items() and len(grown.rows) == len(before.rows) + 1


def pairs_with_odd(study: Path) -> list[dict[str, str]]:
    """A table as this project writes it, with one image per patient."""
    from stages.tables import safe_cell

    images = study / "data/images"
    return [
        {
            "path": safe_cell(path.relative_to(images).as_posix()),
            "label": safe_cell(path.parent.name),
            "patient": f"p{number // 2 if path.parent.name == 'well' else number}",
        }
        for number, path in enumerate(sorted(images.rglob("*.png*")))
    ]


def test_the_table_of_splits_is_csv_by_name(tmp_path: Path) -> None:
    for name in ("splits.xlsx", "splits"):
        with pytest.raises(DataError, match=r"does not end in \.csv"):
            check_free(tmp_path / name)
    check_free(tmp_path / "splits.CSV")
