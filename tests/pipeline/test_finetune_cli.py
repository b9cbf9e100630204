"""Fine-tuning of the LPM by the commands that a user types: from images, then from hidden tokens."""

import csv
import io
import json
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from study_tools import prepared_study

from stages.train.bundle import load_bundle

pytestmark = pytest.mark.timeout(600)

HIDDEN = ("--set", "features.hidden=4")
"""The LPM has 6 blocks: what enters block 4 is what the last two are trained on."""
WIDTH = 64
BLOCK = 10 * WIDTH**2 + 12 * WIDTH
"""Parameters of a block of the LPM, MLP ratio 3."""
NORM_AND_HEAD = 2 * WIDTH + 2 * WIDTH + 2
"""Of the final norm, and of a linear head of two classes."""


@pytest.fixture
def tiny(tmp_path: Path, weights: Path, fpt: Fpt) -> Path:
    """A prepared study of 40 images; nothing is extracted."""
    return prepared_study(tmp_path, weights, fpt)


def store_folders(study: Path) -> list[Path]:
    return [path for path in (study / ".fpt/cache").rglob("receipts") if path.is_dir()]


def probabilities(out: str) -> dict[str, float]:
    """Image -> probability of bright."""
    return {Path(row["path"]).name: float(row["p_bright"]) for row in csv.DictReader(io.StringIO(out))}


def test_from_images_then_from_hidden_tokens_to_one_table(tiny: Path, fpt: Fpt) -> None:
    # From images, before anything is extracted.
    words = ("--method", "finetune", "--output", "outputs/images")
    _, err = fpt("train", *words, cwd=tiny)
    assert "Next: fpt evaluate --model outputs/images/model" in err
    assert not (tiny / "outputs/features").exists()
    assert not store_folders(tiny)
    follow = ("--model", "outputs/images/model", "--output", "outputs/images/evaluation")
    out, _ = fpt("evaluate", *follow, "--json", cwd=tiny)
    metrics = json.loads(out)
    assert (metrics["split"], metrics["auc"] is not None) == ("test", True)
    report = (tiny / "outputs/images/evaluation/report.html").read_text()
    assert "augmented images" in report
    assert not store_folders(tiny), "an evaluation of a model of images needs no features"
    images = sorted((tiny / "images").rglob("*.png"))[:3]
    predicted, _ = fpt("predict", "--model", "outputs/images/model", *images, cwd=tiny)
    assert len(probabilities(predicted)) == 3

    # From hidden tokens, which `fpt extract` caches.
    _, err = fpt("train", *words[:2], "--set", "methods.finetune.source=hidden", cwd=tiny, code=2)
    assert "features.hidden" in err
    _, err = fpt("train", *words[:2], *HIDDEN, cwd=tiny, code=2)
    assert "fpt extract" in err
    fpt("extract", *HIDDEN, cwd=tiny)
    assert len(store_folders(tiny)) == 1
    fpt("train", *words[:2], "--output", "outputs/hidden", *HIDDEN, cwd=tiny)
    settings = yaml.safe_load((tiny / "outputs/hidden/model/settings.yaml").read_text())
    assert settings["methods"]["finetune"] == {"blocks": 2, "source": "hidden"}
    follow = ("--model", "outputs/hidden/model", "--output", "outputs/hidden/evaluation")
    fpt("evaluate", *follow, *HIDDEN, cwd=tiny)
    out, _ = fpt("predict", "--model", "outputs/hidden/model", *images, cwd=tiny)
    again, _ = fpt("predict", "--model", "outputs/images/model", *images, cwd=tiny)
    assert again == predicted, "features that were extracted later change nothing"
    assert probabilities(out).keys() == probabilities(predicted).keys()
    assert out != predicted, "augmented images train another model than cached tokens"

    # Both learn the same parameters, and are one table.
    for name, hidden in (("images", None), ("hidden", 4)):
        bundle = load_bundle(tiny / "outputs" / name / "model")
        assert bundle.spec.network.model_dump()["hidden"] == hidden
        assert bundle.spec.learnable == 2 * BLOCK + NORM_AND_HEAD
        tensors = set(bundle.network.state_dict())
        assert {key.split(".")[2] for key in tensors if ".blocks." in key} == {"4", "5"}
    out, _ = fpt("compare", "outputs/images", "outputs/hidden", "--json", cwd=tiny)
    rows = json.loads(out)["models"]
    assert [row["name"] for row in rows] == ["outputs/images", "outputs/hidden"]
    assert {row["model"]["method"] for row in rows} == {"finetune"}
    assert all(row["train_seconds"] is not None for row in rows)
    out, _ = fpt("compare", "outputs/images", "outputs/hidden", cwd=tiny)
    assert "Difference to outputs/images" in out


def test_a_sweep_over_methods_and_their_own_settings(tiny: Path, fpt: Fpt) -> None:
    fpt("extract", *HIDDEN, cwd=tiny)
    words = ("method=linear,finetune", "methods.finetune.blocks=1,2", *HIDDEN)
    summary = json.loads(fpt("sweep", *words, "--json", cwd=tiny)[0])
    # The axis has no effect on a linear probe, which is fitted once.
    names = ["method=linear", *(f"method=finetune_methods.finetune.blocks={count}" for count in (1, 2))]
    assert list(summary["runs"]) == names
    for name, blocks in zip(names, (0, 1, 2), strict=True):
        folder = tiny / "outputs/sweep/runs" / name
        bundle = load_bundle(folder / "model").spec
        assert bundle.network.method == name.split("_")[0].removeprefix("method=")
        if blocks:
            assert bundle.learnable == blocks * BLOCK + NORM_AND_HEAD
        metrics = json.loads((folder / "evaluation/metrics.json").read_text())
        assert summary["runs"][name]["test"]["auc"] == metrics["auc"]
    assert set(summary["axes"]["methods.finetune.blocks"]) == {"1", "2"}
    # Another value trains only itself.
    written = [tiny / "outputs/sweep/runs" / name / "model/model.safetensors" for name in names]
    before = [path.stat().st_mtime_ns for path in written]
    _, err = fpt("sweep", words[0], "methods.finetune.blocks=1,2,3", *HIDDEN, cwd=tiny)
    assert "1 run was trained, 3 were there" in err
    assert [path.stat().st_mtime_ns for path in written] == before
    bundle = load_bundle(tiny / "outputs/sweep/runs/method=finetune_methods.finetune.blocks=3/model").spec
    assert bundle.network.model_dump()["hidden"] is None, "block 3 lies below the cached tokens: images are read"
    _, err = fpt("sweep", "method=finetune", "methods.finetune.blocks=7", cwd=tiny, code=2)
    assert "methods.finetune.blocks" in err
    _, err = fpt("sweep", "method=finetune", "methods.finetune.block=1", cwd=tiny, code=2)
    assert "methods.finetune.block" in err


def test_the_cost_of_fine_tuning(tiny: Path, fpt: Fpt) -> None:
    def cost(*words: object) -> dict[str, float]:
        found: dict[str, float] = json.loads(fpt("cost", "--method", "finetune", *words, "--json", cwd=tiny)[0])
        return found

    two, one = cost(), cost("--set", "methods.finetune.blocks=1")
    everything = cost("--set", "methods.finetune.blocks=all")
    hidden = cost(*HIDDEN)
    assert (two["learnable"], one["learnable"]) == (2 * BLOCK + NORM_AND_HEAD, BLOCK + NORM_AND_HEAD)
    assert everything["learnable"] == everything["lpm_parameters"]
    assert hidden["learnable"] == two["learnable"]
    assert one["train_tensor_mib"] < two["train_tensor_mib"] < everything["train_tensor_mib"]
    assert hidden["train_states_mib"] < two["train_states_mib"], "the lower blocks are not held"
    out, _ = fpt("cost", "--method", "finetune", cwd=tiny)
    assert out.startswith("finetune on test_vit")
