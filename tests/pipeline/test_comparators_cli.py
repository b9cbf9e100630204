"""alf and loff-ta by the commands that a user types: trained, evaluated, predicted, swept, costed and compared."""

import csv
import io
import json
from pathlib import Path

import pytest
from command_line import Fpt
from study_tools import prepared_study

from stages.train.bundle import load_bundle

pytestmark = pytest.mark.timeout(600)

NAMES = ("alf", "loff-ta")


@pytest.fixture
def tiny(tmp_path: Path, weights: Path, fpt: Fpt) -> Path:
    """An extracted study of 40 images with hidden tokens and token statistics, and without keys and values."""
    study = prepared_study(tmp_path, weights, fpt, tokens=False, hidden=4)
    fpt("extract", cwd=study)
    return study


def test_from_training_to_one_table(tiny: Path, fpt: Fpt) -> None:
    images = sorted((tiny / "images").rglob("*.png"))[:3]
    for name in NAMES:
        folder = f"outputs/{name}"
        fpt("train", "--method", name, "--output", folder, cwd=tiny)
        bundle = load_bundle(tiny / folder / "model").spec
        assert bundle.network.method == name
        cost = json.loads(fpt("cost", "--method", name, "--json", cwd=tiny)[0])
        assert (cost["method"], cost["learnable"]) == (name, bundle.learnable)
        fpt("evaluate", "--model", f"{folder}/model", "--output", f"{folder}/evaluation", cwd=tiny)
        assert "frozen" in (tiny / folder / "evaluation/report.html").read_text()
        out, _ = fpt("predict", "--model", f"{folder}/model", *images, cwd=tiny)
        assert [Path(row["path"]).name for row in csv.DictReader(io.StringIO(out))] == [path.name for path in images]
    out, _ = fpt("compare", *(f"outputs/{name}" for name in NAMES), "--json", cwd=tiny)
    assert [row["model"]["method"] for row in json.loads(out)["models"]] == list(NAMES)


def test_a_sweep_over_both_and_their_settings(tiny: Path, fpt: Fpt) -> None:
    words = (f"method={','.join(NAMES)}", "methods.alf.dropout=0,0.3", "seed=0,1")
    runs = json.loads(fpt("sweep", *words, "--json", cwd=tiny)[0])["runs"]
    # The dropout of the attention weights is no axis of the other method.
    assert sum("method=alf" in name for name in runs) == 4
    assert sum("method=loff-ta" in name for name in runs) == 2
    for name in runs:
        spec = load_bundle(tiny / "outputs/sweep/runs" / name / "model").spec.network
        if spec.method == "alf":
            assert f"methods.alf.dropout={spec.model_dump()['dropout']:g}" in name


def test_what_is_missing_is_named_before_training(tiny: Path, fpt: Fpt) -> None:
    _, err = fpt("train", "--method", "loff-ta", "--set", "features.hidden=null", cwd=tiny, code=2)
    assert "features.hidden" in err
    _, err = fpt("train", "--method", "alf", "--set", "features.statistics=false", cwd=tiny, code=2)
    assert "features.statistics" in err
