"""`fpt evaluate --images` and what `fpt predict` takes, on a finished study."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import Fpt
from PIL import Image
from study_tools import draw_images

# The first test here waits for the whole pipeline, which a loaded machine runs in minutes.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """6 images that the study does not have."""
    return draw_images(tmp_path / "hospital-b", per_class=3, seed=9)


def test_in_a_study(study: Path, others: Path, fpt: Fpt) -> None:
    out, err = fpt("evaluate", "--images", others, cwd=study)
    assert out.splitlines()[0] == "external: 6 images"
    assert "0 images from the cache, 6 computed" in err
    folder = study / "outputs/external/hospital-b"
    assert str(folder / "report.html") in err
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json", "plots", "predictions.parquet", "report.html", "settings.yaml",
    }  # fmt: skip
    other = [folder, "outputs/evaluation"]
    _, err = fpt("compare", *other, cwd=study, code=2)
    assert "cannot be compared" in err
    fpt("evaluate", "--images", others, "--output", "outputs/again", cwd=study)
    out, _ = fpt("compare", folder, "outputs/again", cwd=study)
    assert out.startswith("external: 6 images")


def test_without_a_study(study: Path, others: Path, weights: Path, tmp_path: Path, fpt: Fpt) -> None:
    model = Path(shutil.move(study / "outputs/model", tmp_path / "model"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    rows = [[path.relative_to(others).as_posix(), path.parent.name, "p"] for path in sorted(others.rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(map(",".join, [["path", "diagnosis", "patient"], *rows])))
    words = ["evaluate", "--images", others, "--labels", tmp_path / "labels.csv", "--model", model]
    columns = ["--set", "data.label_column=diagnosis", "--set", "data.group_column=patient"]
    out, err = fpt(*words, *columns, "--set", f"lpm.weights={weights}", "--json", cwd=elsewhere)
    metrics = json.loads(out)
    assert (metrics["images"], metrics["groups"], metrics["auc_interval"]) == (6, 1, None)
    assert "cannot be detected" in err, "no study says which images the model was trained on"
    assert (elsewhere / "outputs/external/hospital-b/predictions.parquet").exists()


def test_images_of_the_study_are_read_from_the_cache_and_named(study: Path, finished: Path, fpt: Fpt) -> None:
    out, err = fpt("evaluate", "--images", finished / "images", "--set", "lpm.weights=gone.safetensors", cwd=study)
    assert "40 images from the cache, 0 computed" in err
    assert out.startswith("Warning: the model was trained on ")


def test_options_that_contradict_each_other(study: Path, others: Path, fpt: Fpt) -> None:
    assert "--images" in fpt("evaluate", "--labels", "params.yaml", cwd=study, code=2)[1]
    assert "--split" in fpt("evaluate", "--images", others, "--split", "val", cwd=study, code=2)[1]


def predicted(text: str) -> list[tuple[str, bool]]:
    """Name of each image, and whether it was predicted."""
    return [(Path(row["path"]).name, bool(row["predicted"])) for row in csv.DictReader(io.StringIO(text))]


def test_patterns_lists_and_tables_are_predicted(study: Path, others: Path, fpt: Fpt) -> None:
    three = [("000.png", True), ("001.png", True), ("002.png", True)]
    assert predicted(fpt("predict", f"{others}/dark/*.png", cwd=study)[0]) == three
    assert predicted(fpt("predict", "dark/*.png", "--model", study / "outputs/model", "--params", study / "params.yaml",
                         cwd=others)[0]) == three  # fmt: skip
    (others / "list.txt").write_text("dark/000.png\n\nbright/gone.png\r\n")
    for word in (others / "list.txt", f"@{others / 'list.txt'}"):
        out, err = fpt("predict", word, cwd=study, code=2)
        assert predicted(out) == [("000.png", True), ("gone.png", False)]
        assert "1 of 2 images predicted." in err
    (others / "table.tsv").write_text("file\tage\ndark/001.png\t4\nbright/002.png\t5\n")
    out, _ = fpt("predict", others / "table.tsv", "--set", "data.path_column=file", cwd=study)
    assert predicted(out) == [("001.png", True), ("002.png", True)]
    _, err = fpt("predict", others / "table.tsv", cwd=study, code=2)
    assert "no column named 'path'" in err
    assert "matches no images" in fpt("predict", f"{others}/*.gif", cwd=study, code=2)[1]


def test_what_is_passed_over_is_named(study: Path, others: Path, fpt: Fpt) -> None:
    Image.open(others / "dark/000.png").save(others / "scan.gif")
    (others / "slice.nrrd").write_bytes(b"NRRD0004")
    (others / "notes.txt").write_text("words")
    shutil.copy(others / "dark/000.png", others / "no-suffix")
    os.mkfifo(others / "pipe")
    out, err = fpt("predict", others, cwd=study)
    assert len(predicted(out)) == 7
    for said in ("(NRRD, not read yet): slice.nrrd", "(GIF, not read yet): scan.gif", "(named pipe): pipe", "1 .txt"):
        assert said in err


def test_the_suffix_of_the_output_chooses_the_format(study: Path, others: Path, fpt: Fpt) -> None:
    _, err = fpt("predict", others, "--output", "new.xls", cwd=study, code=2)
    assert ".csv, .tsv, .parquet, .xlsx" in err
    assert not (study / "new.xls").exists()
    fpt("predict", others, "--output", "new.xlsx", cwd=study)
    assert (study / "new.xlsx").read_bytes().startswith(b"PK")


@pytest.mark.parametrize("width", [60, 80])
def test_numbers_of_eight_models_are_whole(study: Path, fpt: Fpt, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [Path(shutil.copytree(study / "outputs/evaluation", study / f"outputs/model-{n}")) for n in range(8)]
    words = [folder.relative_to(study) for folder in folders]
    models = json.loads(fpt("compare", *words, "--json", cwd=study)[0])["models"]
    monkeypatch.setenv("COLUMNS", str(width))
    out, _ = fpt("compare", *words, cwd=study)
    lines = out.splitlines()
    assert all(len(line) <= width for line in lines[1:] if line.startswith(("│", "┃")))
    accuracies = [cell for line in lines if line.startswith("│ accuracy") for cell in line.split("│")[2:-1]]
    assert [cell.strip() for cell in accuracies[:8]] == [f"{row['metrics']['accuracy']:.3f}" for row in models]
