"""Pictures of the report: which images have maps, their colours, and the section of an evaluation."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from study import make_study

from schemas.manifest import ManifestRow
from stages.evaluate.evaluator import evaluate
from stages.evaluate.pictures import MAPPED, map_figures, map_uri, mapped_rows
from stages.evaluate.predictions import Predictions
from stages.methods.ept import MAP
from stages.train.trainer import train


def predictions(ids: list[int]) -> Predictions:
    rows = tuple(
        ManifestRow(id=f"{one:064x}", path=f"{len(ids) - number:03d}.png", label="a", group=f"{number}", split="test")
        for number, one in enumerate(ids)
    )
    return Predictions(("a", "b"), rows, np.full((len(ids), 2), 0.5, dtype=np.float32))


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_rows_with_maps_are_different_images_in_the_order_of_their_paths() -> None:
    assert mapped_rows(predictions(list(range(11)))) == [10, 8, 6, 4, 2, 0]
    assert mapped_rows(predictions([7, 7, 8])) == [2, 1]
    assert len(mapped_rows(predictions(list(range(100))))) == MAPPED


def test_colours_run_from_dark_to_bright_and_are_the_same_for_all_images() -> None:
    values = np.array([[0.2, 0.4], [0.6, 0.8]], dtype=np.float32)
    brightness = decoded(map_uri(values, 0.2, 0.8)).sum(axis=2)
    assert brightness.shape == (2, 2)
    assert (np.diff(brightness.flatten().astype(int)) > 0).all()
    constant = np.full((2, 2), 0.5, dtype=np.float32)
    assert len(np.unique(decoded(map_uri(constant, 0.5, 0.5)).reshape(-1, 3), axis=0)) == 1
    # Image 1 is constant at what is the highest number of image 0, after the mean over two blocks.
    maps = np.stack([np.stack([values, values + 0.2]), np.full((2, 2, 2), 0.9, dtype=np.float32)])
    [figure] = map_figures({"share": maps}, predictions([0, 1]), {})
    assert (figure["low"], figure["high"]) == ("0.300", "0.900")
    colours = [decoded(one["map"]) for one in figure["images"]]
    assert (colours[1] == colours[0][1, 1]).all()


@pytest.mark.parametrize(("method", "source"), [("ept", "image"), ("ept-lse", "hidden"), ("cvpt", "image")])
def test_an_evaluation_shows_the_maps_that_the_model_offers(method: str, source: str, tmp_path: Path) -> None:
    study = make_study(
        tmp_path,
        method=method,
        features={"hidden": 4 if source == "hidden" else None},
        train={"start_block": 4, "epochs": 1},
    )
    files = study.files(study.extract() if source == "hidden" else None)
    train(study.settings, files, tmp_path / "model", tmp_path / "checkpoints")
    evaluate(files, tmp_path / "model", tmp_path / "evaluation")
    report = (tmp_path / "evaluation/report.html").read_text()
    if method == "cvpt":
        assert "<h2>Maps" not in report and 'class="map"' not in report
        return
    assert report.count("<h2>Maps") == 1 and MAP in report
    maps = re.findall(r'<img class="map" src="([^"]+)"', report)
    assert len(maps) == min(MAPPED, len(list(study.manifest.of("test"))))
    assert all(decoded(one).shape == (4, 4, 3) for one in maps)
    low, high = (float(n) for n in re.findall(r"all images:.*?([\d.]+) <i.*?</i> ([\d.]+)", report)[0])
    assert 0 < low < high < 1
    # Next to each map is its image.
    assert report.count('<div><img src="data:image/jpeg;base64,') == len(maps)
