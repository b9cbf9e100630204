"""Warm start: training from the weights of an earlier model, whose images are not tested."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from study import Study, make_study

from schemas.errors import BundleError, TrainingError, UnsupportedModelError
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from schemas.results import TrainResult
from stages.evaluate.evaluator import evaluate
from stages.fitted_images import count_fitted, encode, union
from stages.methods.positions import resample_positions
from stages.predict.external import _overlap
from stages.train.bundle_spec import encode_spec, read_spec
from stages.train.inputs import inputs_key
from stages.train.job import run_key
from stages.train.trainer import train

STILL = {"lr": 1e-12, "weight_decay": 0.0, "epochs": 1}
"""A training that moves nothing."""


def fit(study: Study, name: str, receipt: Any = None, start: str | None = None, **keys: Any) -> TrainResult:
    """Train from images or features; the model is the folder `name` of the study."""
    settings = study.changed(train={"start_from": start, **keys})
    return train(settings, study.files(receipt), study.root / name, study.root / "checkpoints")


def weights(study: Study, name: str) -> dict[str, torch.Tensor]:
    return load((study.root / name / "model.safetensors").read_bytes())


def ept(root: Path, size: int, method: str = "ept-lse") -> Study:
    return make_study(root, 6, method, features={"image_size": size}, train={"epochs": 1, "lr": 0.02, "keep": "last"})


def test_it_starts_from_the_weights_at_another_image_size(tmp_path: Path) -> None:
    small = ept(tmp_path, 64)
    fit(small, "small")
    large = ept(tmp_path, 96)
    fit(large, "large", start="small", **STILL)
    before, after = weights(small, "small"), weights(large, "large")
    offsets = before["adaptation.offsets"]
    assert offsets.abs().max() > 0.001
    torch.testing.assert_close(
        after["adaptation.offsets"], resample_positions(offsets[..., None], 4, 6)[..., 0], rtol=0, atol=1e-7
    )
    torch.testing.assert_close(after["lpm.head.weight"], before["lpm.head.weight"], rtol=0, atol=1e-7)
    spec, first = read_spec(tmp_path / "large"), read_spec(tmp_path / "small")
    assert spec.start is not None
    assert (spec.start.weights_sha256, spec.start.image_size) == (first.weights_sha256, 64)
    # The folder is no part of the bundle.
    assert spec.train.start_from is None
    metrics = evaluate(large.files(None), tmp_path / "large", tmp_path / "evaluation")
    assert metrics.warnings == ()
    assert "a model at 64 x 64 pixels" in (tmp_path / "evaluation/report.html").read_text()


def test_a_side_network_continues_and_a_chain_carries_all_images(tmp_path: Path) -> None:
    study = make_study(tmp_path, train={"epochs": 1, "keep": "last"})
    receipt = study.extract()
    fit(study, "first", receipt)
    fit(study, "second", receipt, start="first", **STILL)
    for name, value in weights(study, "first").items():
        torch.testing.assert_close(weights(study, "second")[name], value, rtol=0, atol=1e-7)
    fit(study, "third", receipt, start=str(tmp_path / "second"))
    spec = read_spec(tmp_path / "third")
    fitted = [row.id for row in study.manifest.rows if row.split != "test"]
    assert spec.start is not None
    assert count_fitted(spec.start.fitted_images, fitted) == len(fitted)
    assert spec.fitted_images == spec.start.fitted_images == encode(fitted)


def moved(manifest: Manifest, source: str, target: str) -> Manifest:
    """The manifest with one image of every class in another split."""
    rows, seen = [], set()
    for row in manifest.rows:
        changes = row.split == source and row.label not in seen
        seen |= {row.label} if changes else set()
        rows.append(row.model_copy(update={"split": target}) if changes else row)
    return manifest.model_copy(update={"rows": tuple(rows)})


def test_images_that_trained_the_first_model_are_not_tested(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    receipt = study.extract()
    fit(study, "first", receipt)
    fit(study, "second", receipt, start="first")
    tested = moved(study.manifest, "train", "test")
    count, total = 3, len(list(tested.of("test")))
    study.manifest = tested
    with pytest.raises(TrainingError, match=rf"{count} of {total} test images trained the model in .*first"):
        fit(study, "third", receipt, start="first")
    warnings = evaluate(study.files(receipt), tmp_path / "second", tmp_path / "evaluation").warnings
    assert f"{count} of {total} images trained the model that training started from" in warnings[0]
    rows = tuple(tested.of("test"))
    assert f"{count} of {total} images trained the model" in _overlap(rows, read_spec(tmp_path / "second"), None)[0]
    # Images that chose its epoch count as well.
    study.prepare()
    study.manifest = moved(study.manifest, "val", "test")
    with pytest.raises(TrainingError, match=r"test images trained the model in .*first, or chose its epoch"):
        fit(study, "third", receipt, start="first")


def test_a_bundle_that_does_not_record_its_images_needs_the_same_splits(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    receipt = study.extract()
    fit(study, "first", receipt)
    old = read_spec(tmp_path / "first").model_copy(update={"fitted_images": None})
    (tmp_path / "first/model.json").write_bytes(encode_spec(old))
    fit(study, "second", receipt, start="first")
    start = read_spec(tmp_path / "second").start
    assert start is not None
    assert count_fitted(start.fitted_images, [row.id for row in study.manifest.of("train")]) > 0
    study.manifest = moved(study.manifest, "test", "train")
    with pytest.raises(TrainingError, match=r"that the model in .* was trained on are not known"):
        fit(study, "second", receipt, start="first")


def test_the_key_of_a_run_is_that_of_the_weights_not_of_their_folder(study: Study) -> None:
    receipt = study.extract()
    fit(study, "first", receipt)
    fit(study, "other", receipt, seed=1)
    shutil.copytree(study.root / "first", study.root / "copy")

    def key(start: str | None) -> str:
        settings: ResolvedSettings = study.changed(train={"start_from": start})
        return run_key(settings, study.manifest, inputs_key(settings, study.files(receipt)))

    assert key("first") == key("copy") == key(str(study.root / "copy"))
    assert len({key(None), key("first"), key("other")}) == 3


def test_a_model_of_other_settings_is_refused_with_every_difference(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    receipt = study.extract()
    fit(study, "first", receipt)
    with pytest.raises(BundleError, match=r"There is no model bundle in .*nowhere"):
        fit(study, "second", receipt, start="nowhere")
    with pytest.raises(BundleError, match="prompts: 8 here, 16 there"):
        fit(study, "second", receipt, start="first", prompts=8)
    with pytest.raises(BundleError, match="method: 'side' here, 'fpt\\+' there"):
        side = study.settings.model_copy(update={"method": "side"})
        train(_started(side), study.files(receipt), tmp_path / "second", tmp_path / "checkpoints")
    with pytest.raises(BundleError, match="linear cannot start from a model"):
        linear = study.settings.model_copy(update={"method": "linear"})
        train(_started(linear), study.files(receipt), tmp_path / "second", tmp_path / "checkpoints")
    with pytest.raises(BundleError, match=r"classes: .*here"):
        renamed = study.manifest.model_copy(update={"classes": tuple(reversed(study.manifest.classes))})
        train(
            _started(study.settings),
            study.files(receipt, manifest=renamed),
            tmp_path / "second",
            tmp_path / "checkpoints",
        )


def _started(settings: ResolvedSettings) -> ResolvedSettings:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"start_from": "first"})})


def test_trainings_with_phases_and_factors_of_pairs_are_refused(tmp_path: Path) -> None:
    study = ept(tmp_path, 64, "pt-peft")
    fit(study, "first", epochs=2)
    with pytest.raises(BundleError, match="pt-peft with these settings cannot start"):
        fit(study, "second", start="first", epochs=2)
    fit(ept(tmp_path, 64, "attn-scale-matrix"), "matrix")
    with pytest.raises(UnsupportedModelError, match="attn-scale-matrix for 4 x 4 patches"):
        fit(ept(tmp_path, 96, "attn-scale-matrix"), "second", start="matrix")


def test_digests_of_images() -> None:
    text = encode(["a", "b", "a"])
    assert text == encode(["b", "a"])
    assert len(text) == 16
    assert count_fitted(text, ["a", "c", "b", "d"]) == 2
    assert union(text, encode(["c"])) == encode("abc")
    assert (encode([]), count_fitted("", ["a"])) == ("", 0)
    with pytest.raises(ValueError, match="digests"):
        count_fitted(text[:4], ["a"])
