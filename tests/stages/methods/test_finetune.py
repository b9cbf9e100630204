"""Fine-tuning: from hidden tokens as from images, with the frozen blocks of the LPM untouched."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study import Study, evaluated_and_predicted, make_study

from schemas.base import digest
from schemas.errors import CacheIncompleteError, UnsupportedModelError
from schemas.results import TrainResult
from schemas.settings import LpmSettings
from schemas.specs import FinetuneSpec
from stages.lpm.loading import load_lpm
from stages.methods.finetune import METHOD
from stages.train.bundle import load_bundle
from stages.train.trainer import train

PLAIN = {"flip": 0.0, "brightness": 0.0, "contrast": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
"""Augmentation that changes nothing."""


def study_at(root: Path, source: str, blocks: Any = 2, dtype: str = "float32", **train_changes: Any) -> Study:
    return make_study(
        root,
        method="finetune",
        features={"hidden": 3, "dtype": dtype},
        methods={"finetune": {"blocks": blocks, "source": source}},
        train={"augment": PLAIN, "lr": 1e-3, **train_changes},
    )


def run(study: Study, extracted: bool) -> TrainResult:
    files = study.files(study.extract() if extracted else None)
    return train(study.settings, files, study.root / "model", study.root / "checkpoints")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("int8", 2e-2)])
def test_hidden_tokens_give_the_model_of_images(tmp_path: Path, dtype: str, tolerance: float) -> None:
    hidden, image = study_at(tmp_path / "h", "hidden", dtype=dtype), study_at(tmp_path / "i", "image")
    left, right = run(hidden, extracted=True), run(image, extracted=False)
    for mine, other in zip(left.epochs, right.epochs, strict=True):
        assert mine.val_loss == pytest.approx(other.val_loss, abs=tolerance)
    if dtype == "float32":
        states = [load_file(study.root / "model/model.safetensors") for study in (hidden, image)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[1].items():
            torch.testing.assert_close(value, states[0][name], rtol=1e-3, atol=1e-4)


def test_the_bundle_holds_only_what_was_trained(tmp_path: Path) -> None:
    study = study_at(tmp_path, "image")
    run(study, extracted=False)
    saved = load_file(tmp_path / "model/model.safetensors")
    depth = study.lpm.depth
    blocks = {int(name.split(".")[2]) for name in saved if name.startswith("lpm.blocks.")}
    assert blocks == {depth - 2, depth - 1}
    assert {name.split(".")[1] for name in saved} == {"blocks", "norm", "head"}
    source = LpmSettings(name="test_vit", weights=str(tmp_path / "lpm.safetensors"))
    lpm = load_lpm(source, study.lpm.image_size, tmp_path).model
    network: Any = load_bundle(tmp_path / "model").network
    network.use_lpm(lpm)
    own = dict(network.lpm.named_parameters())
    for name, value in lpm.named_parameters():
        frozen = f"lpm.{name}" not in saved
        assert torch.equal(own[name], value) == frozen, name


@pytest.mark.parametrize("source", ["hidden", "image"])
def test_evaluation_and_prediction_agree(tmp_path: Path, source: str) -> None:
    study = study_at(tmp_path, source)
    run(study, extracted=source == "hidden")
    evaluated, predicted = evaluated_and_predicted(study, study.extract() if source == "hidden" else None)
    np.testing.assert_allclose(predicted, evaluated, atol=1e-4)


@pytest.mark.parametrize("source", ["hidden", "image"])
def test_checkpointing_gives_the_same_model(tmp_path: Path, source: str) -> None:
    # Three of six blocks: the hidden tokens enter the first trained one, which the backward pass computes again.
    studies = [study_at(tmp_path / str(on), source, blocks=3, checkpointing=on) for on in (False, True)]
    for study in studies:
        run(study, extracted=source == "hidden")
    plain, repeated = (load_file(study.root / "model/model.safetensors") for study in studies)
    for name, value in plain.items():
        torch.testing.assert_close(repeated[name], value)


def test_all_of_the_lpm_is_trained(tmp_path: Path) -> None:
    study = study_at(tmp_path, "image", blocks="all", epochs=1)
    run(study, extracted=False)
    assert {"lpm.patch_embed.proj.weight", "lpm.pos_embed"} <= load_file(tmp_path / "model/model.safetensors").keys()


def test_training_on_cached_features_imports_neither_pillow_nor_code_of_the_lpm() -> None:
    code = (
        "import sys, stages.train.trainer; print([name for name in sys.modules"
        " if name.partition('.')[0] in ('PIL', 'timm', 'torchvision') or name.startswith('stages.lpm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_an_extraction_the_message_names_both_ways(tmp_path: Path) -> None:
    study = study_at(tmp_path, "hidden")
    with pytest.raises(CacheIncompleteError, match=r"fpt extract.*methods\.finetune\.source=image"):
        train(study.settings, study.files(None), tmp_path / "model", tmp_path / "checkpoints")


def test_a_model_that_a_bundle_could_not_rebuild_is_refused() -> None:
    spec = FinetuneSpec(
        classes=2, lpm="", image_size=64, depth=6, first_block=4, everything=False, hidden=None
    )  # fmt: skip
    for args, accepted in (({}, True), ({"embed_dim": 32}, False)):
        content = digest({"architecture": "test_vit", "args": args})[:8]
        named = spec.model_copy(update={"lpm": f"local-dir:test_vit@{content}"})
        with nullcontext() if accepted else pytest.raises(UnsupportedModelError, match="model_args"):
            METHOD.build(named)
