"""LOFF-TA: cached tokens, augmented in training only, from settings to predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study import Study, evaluated_and_predicted, make_study, train_study, validation_loss

from schemas.errors import CacheIncompleteError, CacheMismatchError, SettingsError
from schemas.resolve import feature_spec
from schemas.specs import LoffTaSpec
from stages.evaluate.evaluator import evaluate
from stages.methods.batch import Batch
from stages.methods.loff_ta import METHOD, TokenClassifier
from stages.train.bundle import load_bundle
from stages.train.cost import estimate_cost
from stages.train.trainer import train, train_together

LOOP = {"epochs": 12, "lr": 1e-3}
SPEC = {
    "classes": 3, "hidden": 3, "lpm_width": 16, "grid": 4, "prefix_tokens": 2, "pooled_grid": 4, "width": 24,
    "blocks": 2, "heads": 3,
}  # fmt: skip


def study_at(root: Path, dtype: str = "float16", **train_changes: Any) -> Study:
    features = {"hidden": 3, "dtype": dtype, "tokens": False}
    return make_study(root, method="loff-ta", features=features, train=train_changes)


def network(seed: int = 0, **changes: Any) -> TokenClassifier:
    torch.manual_seed(seed)
    built = METHOD.build(LoffTaSpec.model_validate({**SPEC, **changes}))
    assert isinstance(built, TokenClassifier)
    return built


def batch(rows: int = 6, grid: int = 4) -> Batch:
    hidden = torch.randn(rows, 2 + grid**2, 16, generator=torch.Generator().manual_seed(0))
    return Batch(torch.zeros(rows, dtype=torch.int64), hidden={"hidden": hidden})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_it_learns_and_predicts_what_it_is_evaluated_by(tmp_path: Path, dtype: str) -> None:
    study = study_at(tmp_path, dtype, **LOOP)
    receipt = study.extract()
    result = train_study(study, receipt)
    assert result.best.val_auc is not None
    assert result.best.val_auc > 0.9
    assert validation_loss(study, receipt) == pytest.approx(result.best.val_loss, abs=1e-4)
    evaluated, predicted = evaluated_and_predicted(study, receipt)
    np.testing.assert_allclose(predicted, evaluated, atol=5e-3)
    report = (tmp_path / "evaluation/report.html").read_text()
    assert "hidden tokens that enter block 3, augmented" in report
    assert "fine-tuned" not in report


def test_the_lpm_is_not_needed_for_training(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    receipt = study.extract()
    (tmp_path / "lpm.safetensors").unlink()
    train_study(study, receipt)
    evaluate(study.files(receipt), tmp_path / "model", tmp_path / "evaluation")


def test_settings_without_hidden_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        make_study(tmp_path, method="loff-ta")
    problems = dict(caught.value.problems)
    assert set(problems) == {"features.hidden"}
    assert "such as 3" in problems["features.hidden"]


def test_features_of_another_block_or_none_are_refused(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    with pytest.raises(CacheIncompleteError) as caught:
        train(study.settings, study.files(None), tmp_path / "model", tmp_path / "checkpoints")
    assert "finetune" not in str(caught.value), "there is no other source"
    receipt = study.extract()
    with pytest.raises(CacheMismatchError, match="hidden"):
        train_study(study, receipt, settings=study.changed(features={"hidden": 4}))
    spec = METHOD.spec(study.settings, study.lpm, 3)
    features = feature_spec(study.settings, study.lpm, "0" * 64)
    assert spec.matches(features)
    assert not spec.matches(features.model_copy(update={"hidden": 4}))
    larger = study.lpm.model_copy(update={"image_size": 2 * study.lpm.image_size})
    assert not spec.matches(features.model_copy(update={"lpm": larger}))


def test_runs_of_a_sweep_are_those_of_single_trainings(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    receipt = study.extract()
    variants = [study.changed(train={"seed": seed, "order_seed": 0}) for seed in (0, 1)]
    outputs = [tmp_path / f"together{seed}" for seed in (0, 1)]
    train_together(variants, study.files(receipt), outputs, tmp_path / "checkpoints")
    states = [load_file(folder / "model.safetensors") for folder in outputs]
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    for settings, state in zip(variants, states, strict=True):
        train_study(study, receipt, "single", settings=settings)
        single = load_file(tmp_path / "single/model.safetensors")
        for name, value in state.items():
            torch.testing.assert_close(value, single[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"checkpointing": True}])
def test_cheaper_steps_give_the_same_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    study = study_at(tmp_path, epochs=2)
    receipt = study.extract()
    plain = train_study(study, receipt, "plain")
    cheaper = train_study(study, receipt, "cheaper", settings=study.changed(train=changes))
    for mine, other in zip(plain.epochs, cheaper.epochs, strict=True):
        assert other.train_loss == pytest.approx(mine.train_loss, abs=1e-5)
        assert other.val_loss == pytest.approx(mine.val_loss, abs=1e-5)


def test_tokens_are_augmented_in_training_only() -> None:
    classifier, given = network(), batch()
    assert given.hidden is not None
    before = given.hidden["hidden"].clone()
    classifier.eval()
    assert torch.equal(classifier(given), classifier(given))
    classifier.train().reseed(0, 1)
    first = classifier(given)
    assert not torch.equal(first, classifier(given))
    classifier.reseed(0, 1)
    assert torch.equal(classifier(given), first)
    assert torch.equal(given.hidden["hidden"], before)


def test_every_token_and_its_place_matter() -> None:
    classifier, given = network().eval(), batch(1)
    assert given.hidden is not None
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(std=0.3)
    hidden = given.hidden["hidden"].requires_grad_()
    classifier(given).sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.abs().sum(dim=-1).min() > 0)
    swapped = hidden.detach().clone()
    swapped[:, [5, 6]] = swapped[:, [6, 5]]
    other = Batch(given.labels, hidden={"hidden": swapped})
    assert not torch.allclose(classifier(other), classifier(given), atol=1e-4)


def test_a_large_grid_is_pooled() -> None:
    given = batch(2, grid=8)
    assert given.hidden is not None
    prefix, grid = network(grid=8).pooled(given.hidden["hidden"])
    assert torch.equal(prefix, given.hidden["hidden"][:, :2])
    cells = given.hidden["hidden"][:, 2:].view(2, 4, 2, 4, 2, 16)
    torch.testing.assert_close(grid, cells.mean(dim=(2, 4)).flatten(1, 2))
    assert network(grid=8)(given).shape == (2, 3)


@pytest.mark.parametrize(("image_size", "pooled"), [(64, 4), (256, 16), (512, 16), (592, 16)])
def test_at_most_256_patch_tokens_are_read(tmp_path: Path, image_size: int, pooled: int) -> None:
    study = study_at(tmp_path)
    spec = METHOD.spec(study.settings, study.lpm.model_copy(update={"image_size": image_size}), 3)
    assert (spec.grid, spec.pooled_grid) == (image_size // 16, pooled)
    details = dict(METHOD.describe(spec))
    assert ("pooled to 16 x 16" in details["Training reads"]) == (spec.grid > 16)


def test_its_cost_is_that_of_the_trained_network(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    cost = estimate_cost(study.settings, study.lpm, 3)
    train_study(study, study.extract())
    assert cost.learnable == load_bundle(tmp_path / "model").spec.learnable
    assert cost.train_tensor_mib > cost.train_states_mib > 0
    hidden_mib = study.settings.train.batch_size * study.lpm.tokens * study.lpm.width * 2 / 2**20
    assert cost.train_batch_mib > hidden_mib
