"""Probe-only studies of LPMs without global attention, by the commands that a user types."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from command_line import Fpt
from map_models import FAMILIES, save_model
from study_tools import draw_images

from pipeline.commands.doctor import _resolve
from pipeline.params import load_settings
from schemas.methods import METHODS
from stages.evaluate.predictions import read_predictions
from stages.store.extraction_receipt import read_extraction_receipt
from stages.store.layout import open_store_layout
from stages.train.bundle import load_bundle

pytestmark = pytest.mark.timeout(600)

CLOSED = [name for name, row in METHODS.items() if row.closed_form]


def study_of(folder: Path, family: str, fpt: Fpt, **features: Any) -> Path:
    """A prepared study of 40 images on a tiny model; nothing is extracted."""
    draw_images(folder / "images")
    name, size, arguments = FAMILIES[family]
    model = save_model(folder / "lpm", family)
    by_name = {"name": name, "weights": str(model / "model.safetensors")}
    params = {
        "method": "statistics",
        "data": {"images": "images"},
        "lpm": {"name": f"local-dir:{model}"} if arguments else by_name,
        "features": {"image_size": size, "shard_size": 8, "tokens": False, **features},
        "compute": {"device": "cpu", "threads": 1},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    fpt("prepare", cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("family", "unit", "methods"),
    [("convnext", "stage", ("statistics", "linear", "knn")), ("sam", "block", ("statistics",))],
)
def test_from_extraction_to_prediction(
    tmp_path: Path, fpt: Fpt, family: str, unit: str, methods: tuple[str, ...]
) -> None:
    study = study_of(tmp_path, family, fpt)
    plan = json.loads(fpt("extract", "--plan", "--json", cwd=study)[0])
    assert (plan["to_compute"], plan["estimate"]) == (40, "probe")
    assert 0 <= plan["seconds"] < 60
    fpt("extract", cwd=study)
    receipt = read_extraction_receipt(study / "outputs/features/receipt.json")
    spec = receipt.spec
    assert spec.fingerprint == plan["fingerprint"]
    assert len(spec.lpm.map_widths) == 4
    group: Any = zarr.open_group(open_store_layout(study / ".fpt/cache", spec).path / "features.zarr", mode="r")
    assert set(group.array_keys()) == {"pooled", "statistics", "side", "sha256"}
    names = [name for name, _, _ in group.attrs["statistics"]]
    assert names == [f"{kind} of {unit} {n}" for n in range(4) for kind in ("outputs", "output covariance")]
    assert np.isfinite(group["statistics"][:]).all()
    for method in methods:
        folder = f"outputs/{method}"
        fpt("train", "--method", method, "--output", folder, cwd=study)
        fpt("evaluate", "--model", f"{folder}/model", "--output", f"{folder}/evaluation", cwd=study)
        table = read_predictions(study / folder / "evaluation/predictions.parquet")
        images = [study / "images" / row.path for row in table.rows]
        out, _ = fpt("predict", "--model", f"{folder}/model", *images, cwd=study)
        found = [[float(row["p_bright"]), float(row["p_dark"])] for row in csv.DictReader(io.StringIO(out))]
        np.testing.assert_allclose(found, table.probabilities, atol=2e-3)
        report = (study / folder / "evaluation/report.html").read_text()
        assert f"4 {unit}s, width" in report
        assert "tapped" not in report.lower()


def test_every_closed_form_reads_such_a_store(tmp_path: Path, fpt: Fpt) -> None:
    study = study_of(tmp_path, "convnext", fpt)
    fpt("extract", cwd=study)
    segments = {one.name: (one.start, one.stop) for one in receipt_spec(study).segments}
    for method in CLOSED:
        fpt("train", "--method", method, "--output", f"outputs/{method}", cwd=study)
    sources = load_bundle(study / "outputs/covariance/model").spec.network.model_dump()["sources"]
    # Its rows have no pooled outputs before the statistics.
    assert {source["name"]: source["spans"] for source in sources} == {
        name: (place,) for name, place in segments.items() if "covariance" in name
    }
    (source,) = load_bundle(study / "outputs/all-block-linear/model").spec.network.model_dump()["sources"]
    assert source["name"] == "mean of every stage"
    assert source["spans"] == tuple(
        (start, start + (stop - start) // 2) for name, (start, stop) in segments.items() if name.startswith("outputs")
    )


def receipt_spec(study: Path) -> Any:
    return read_extraction_receipt(study / "outputs/features/receipt.json").spec


@pytest.mark.parametrize("choice", [{"precision": "bfloat16"}, {"resize": "letterbox"}, {"normalisation": "dataset"}])
def test_how_pixels_are_prepared_and_computed_is_as_for_tokens(
    tmp_path: Path, fpt: Fpt, choice: dict[str, str]
) -> None:
    study = study_of(tmp_path, "convnext", fpt, **choice)
    fpt("extract", cwd=study)
    spec = receipt_spec(study)
    assert {name: getattr(spec, name) for name in choice} == choice
    fpt("train", "--method", "linear", cwd=study)
    out, _ = fpt("predict", study / "images/dark/000.png", cwd=study)
    assert next(csv.DictReader(io.StringIO(out)))["predicted"] == "dark"


def test_what_needs_tokens_is_refused(tmp_path: Path, fpt: Fpt) -> None:
    study = study_of(tmp_path, "convnext", fpt)
    _, err = fpt("extract", "--set", "features.tokens=true", cwd=study, code=2)
    assert "cannot be the LPM" in err
    assert "features.tokens=false" in err
    _, err = fpt("extract", "--set", "features.hidden=2", cwd=study, code=2)
    assert "without features.hidden" in err
    fpt("extract", cwd=study)
    for method in ("fpt+", "side", "alf", "finetune"):
        _, err = fpt("train", "--method", method, cwd=study, code=2)
        assert "method: must be one of statistics" in err
        assert "features.tokens" not in err
    found = _resolve(load_settings(study / "params.yaml"), study, study / ".fpt/cache", [])
    assert "4 stages, widths 24, 32, 48, 64, pooled width 64 at 64 pixels" in found.detail
    _, err = fpt("extract", "--plan", "--set", "features.image_size=100", cwd=study)
    assert "100 -> 96: test_convnext.r160_in1k needs a multiple of 32 pixels" in err
