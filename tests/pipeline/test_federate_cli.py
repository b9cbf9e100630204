"""`fpt federate`: real and simulated sites, the model afterwards, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from study_tools import draw_images


@pytest.fixture
def prepared(tmp_path: Path, weights: Path, fpt: Fpt) -> Path:
    """A study of 40 images of two hospitals with features."""
    draw_images(tmp_path / "images")
    images = sorted((tmp_path / "images").rglob("*.png"))
    lines = ["path,label,patient,site"]
    for number, path in enumerate(images):
        patient = number // 2
        where = path.relative_to(tmp_path / "images").as_posix()
        lines.append(f"{where},{path.parent.name},p{patient},{'north' if patient % 3 else 'south'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    params = {
        "method": "ridge",
        "data": {"images": "images", "labels": "labels.csv", "site_column": "site"},
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "shard_size": 8, "precision": "float32", "side_image_size": 48},
        "train": {"epochs": 4, "batch_size": 8, "side_reduction": 2, "side_image_size": 32},
        "compute": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    fpt("prepare", cwd=tmp_path)
    fpt("extract", cwd=tmp_path)
    return tmp_path


def test_sites_of_the_manifest_and_simulated_ones_give_a_model(prepared: Path, fpt: Fpt) -> None:
    once = json.loads(fpt("federate", "--json", cwd=prepared)[0])
    assert [site["name"] for site in once["sites"]] == ["north", "south"] and len(once["rounds"]) == 1
    assert once["down_bytes"] == 0 < once["up_bytes"]
    shown = fpt(
        "federate", "--method", "fpt+", "--sites", "3", "--partition", "dirichlet:1", "--local-epochs", "2",
        "--mu", "0.1", "--output", "averaged", cwd=prepared,
    )  # fmt: skip
    assert "site-3" in shown[0] and "Round 2/2" in shown[1] and "fpt evaluate --model" in shown[1]
    summary = json.loads((prepared / "averaged/summary.json").read_text())
    assert summary["plan"] == {"rounds": 2, "local_epochs": 2, "mu": 0.1}
    for folder in ("outputs/federated", "averaged"):
        words = ["--model", f"{folder}/model", "--output", f"{folder}/evaluation", "--json"]
        assert json.loads(fpt("evaluate", *words, cwd=prepared)[0])["auc"] is not None
        written = json.loads((prepared / folder / "summary.json").read_text())
        counts = "2 sites, 1 round" if folder == "outputs/federated" else "3 sites, 2 rounds"
        line = f"{counts}, {written['up_bytes'] / 2**20:,.2f} MiB up per site and round"
        assert line in (prepared / folder / "evaluation/report.html").read_text()
    # Another training in the same folder leaves the summary where it is.
    fpt("train", "--method", "fpt+", "--output", "averaged", cwd=prepared)
    fpt("evaluate", *words, cwd=prepared)
    assert "MiB up per site" not in (prepared / "averaged/evaluation/report.html").read_text()
    assert fpt("predict", "images/dark", "--model", "averaged/model", cwd=prepared)[0].count("dark/") == 20


def test_what_a_site_sends_is_listed_for_every_method(prepared: Path, fpt: Fpt) -> None:
    lines = fpt("federate", "--traffic", cwd=prepared)[0].splitlines()
    for title, often in (("EPT-lse", "each round"), ("ridge regression on sums", "once")):
        (line,) = [line for line in lines if f" {title} " in line]
        assert often in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "iid"], "--sites 3"),
        (["--sites", "2", "--partition", "skewed"], "dirichlet:ALPHA"),
        (["--sites", "2", "--method", "statistics"], "ridge"),
        (["--sites", "999"], "999 sites"),
    ],
)
def test_errors_tell_what_to_change(prepared: Path, fpt: Fpt, words: list[str], message: str) -> None:
    assert message in fpt("federate", *words, cwd=prepared, code=2)[1]
