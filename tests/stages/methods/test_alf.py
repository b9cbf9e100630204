"""Attentive layer fusion: what it reads, what it computes, and its way through training, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study import Study, evaluated_and_predicted, make_study, train_study, validation_loss

from schemas.errors import CacheMismatchError, SettingsError
from schemas.features import FeatureSpec
from schemas.methods import METHODS
from schemas.resolve import feature_spec
from schemas.specs import AlfSpec
from schemas.statistics import output_vectors
from stages.methods.alf import METHOD, LayerFusion
from stages.methods.batch import Batch
from stages.store.reader import open_store
from stages.train.bundle import load_bundle
from stages.train.cost import estimate_cost
from stages.train.trainer import train_together

LOOP = {"epochs": 12, "lr": 2e-3}


def study_at(root: Path, **sections: Any) -> Study:
    return make_study(root, **{"method": "alf", **sections})


def features_of(study: Study) -> FeatureSpec:
    return feature_spec(study.settings, study.lpm, "0" * 64)


def network(seed: int = 0, **changes: Any) -> LayerFusion:
    """A network of four vectors with a head that is not zero."""
    spec = {"classes": 3, "lpm_width": 8, "vectors": (0, 8, 40, 48), "heads": 4, "dropout": 0.5, **changes}
    torch.manual_seed(seed)
    built = METHOD.build(AlfSpec.model_validate(spec))
    assert isinstance(built, LayerFusion)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3)
        built.mean.normal_()
        built.scale.uniform_(0.5, 2)
    return built


def batch(rows: int = 6) -> Batch:
    statistics = torch.randn(rows, 60, generator=torch.Generator().manual_seed(0)).half()
    return Batch(torch.zeros(rows, dtype=torch.int64), statistics=statistics)


def test_the_vectors_are_class_token_and_mean_of_every_block(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    features = features_of(study)
    spec = METHOD.spec(study.settings, study.lpm, 3)
    width, depth = study.lpm.width, study.lpm.depth
    outputs = [one for one in features.segments if one.kind == "outputs"]
    assert len(outputs) == depth
    assert spec.vectors == tuple(one.start + part * width for one in outputs for part in (0, 1))
    assert spec.heads == 2 * depth
    assert spec.matches(features)
    assert spec.matches(features.model_copy(update={"layers": (), "kept": 0})), "kept tokens are not read"
    assert not spec.matches(features.model_copy(update={"statistics": False}))
    without = features.lpm.model_copy(update={"has_class_token": False})
    assert not spec.matches(features.model_copy(update={"lpm": without}))
    other = METHOD.spec(study.settings, without, 3)
    means = output_vectors(features.model_copy(update={"lpm": without}).segments, width)
    assert other.vectors == means
    assert len(means) == other.heads == depth


def test_the_logits_are_those_of_attention_over_vectors() -> None:
    fusion, given = network().eval(), batch()
    assert given.statistics is not None
    p = {name: value.detach().double() for name, value in fusion.named_parameters()}

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    query = p["to_query.weight"] @ (normalised(p["query"]) * p["query_norm.weight"] + p["query_norm.bias"])
    for row, logits in zip(given.statistics.double(), fusion(given), strict=True):
        vectors = torch.stack([row[start : start + 8] for start in fusion.spec.vectors])
        vectors = normalised((vectors - fusion.mean) / fusion.scale)
        keys = (vectors * p["key_gain"] + p["key_bias"]) @ p["to_key.weight"].T
        values = (vectors * p["value_gain"] + p["value_bias"]) @ p["to_value.weight"].T
        heads = []
        for head in range(4):
            some = slice(4 * head, 4 * head + 4)
            weights = (keys[:, some] @ query[some] / 2).softmax(0)
            heads.append(weights @ values[:, some])
        fused = p["out.weight"] @ torch.cat(heads) + p["out.bias"]
        expected = p["head.weight"] @ (normalised(fused) * p["norm.weight"] + p["norm.bias"]) + p["head.bias"]
        torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_vectors_are_standardised_by_the_training_images(tmp_path: Path) -> None:
    study = study_at(tmp_path, train={"epochs": 1})
    receipt = study.extract()
    train_study(study, receipt)
    fusion = load_bundle(tmp_path / "model").network
    assert isinstance(fusion, LayerFusion)
    ids = [row.id for row in study.manifest.of("train")]
    rows = open_store(study.cache, receipt).read(ids, ["statistics"])["statistics"].astype(np.float64)
    width = fusion.spec.lpm_width
    vectors = np.stack([rows[:, start : start + width] for start in fusion.spec.vectors], axis=1)
    np.testing.assert_allclose(fusion.mean.numpy(), vectors.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fusion.scale.numpy(), vectors.std(axis=0), rtol=1e-3)


def test_a_number_that_does_not_vary_is_not_amplified() -> None:
    fusion, given = network(), batch()
    assert given.statistics is not None
    given.statistics[:, 3] = 60.03
    fusion.standardise([given.rows(slice(0, 4)), given.rows(slice(4, 6))])
    assert float(fusion.scale[0, 3]) == 1
    assert float(fusion.mean[0, 3]) == pytest.approx(60.03, abs=0.02)
    assert bool((fusion.scale[0, 4:] != 1).all())


def test_dropout_of_micro_batches_is_that_of_the_batch() -> None:
    fusion, given = network().train(), batch()
    fusion.reseed(1, 2)
    complete = fusion(given)
    assert not torch.equal(complete, fusion(given)), "the next batch has other draws"
    fusion.reseed(1, 2)
    parts = []
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        fusion.set_micro_batch(rows, 6, again=start > 0)
        parts.append(fusion(given.rows(rows)))
    torch.testing.assert_close(torch.cat(parts), complete)


def test_it_learns_and_predicts_what_it_is_evaluated_by(tmp_path: Path) -> None:
    # No tokens are cached: the statistics of all blocks are enough.
    study = study_at(tmp_path, features={"tokens": False}, train=LOOP)
    receipt = study.extract()
    result = train_study(study, receipt)
    assert result.best.val_auc is not None
    assert result.best.val_auc > 0.9
    assert validation_loss(study, receipt) == pytest.approx(result.best.val_loss, abs=1e-5)
    evaluated, predicted = evaluated_and_predicted(study, receipt)
    np.testing.assert_allclose(predicted, evaluated, atol=2e-3)
    report = (tmp_path / "evaluation/report.html").read_text()
    assert "Fused vectors" in report
    assert "frozen" in report
    assert "Kept tokens" not in report


def test_runs_of_a_sweep_are_those_of_single_trainings(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    receipt = study.extract()
    variants = [study.changed(train={"seed": seed}) for seed in (0, 1)]
    outputs = [tmp_path / f"together{seed}" for seed in (0, 1)]
    shared = [one.model_copy(update={"train": one.train.model_copy(update={"order_seed": 0})}) for one in variants]
    train_together(shared, study.files(receipt), outputs, tmp_path / "checkpoints")
    for settings, folder in zip(shared, outputs, strict=True):
        train_study(study, receipt, "single", settings=settings)
        single = load_file(tmp_path / "single/model.safetensors")
        for name, value in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(value, single[name], atol=1e-6, rtol=1e-5)


def test_features_without_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"features\.statistics.*alf reads token statistics"):
        study_at(tmp_path / "settings", features={"statistics": False})
    study = make_study(tmp_path, method="linear", features={"statistics": False})
    receipt = study.extract()
    with pytest.raises(CacheMismatchError, match=r"features\.statistics: true.*fpt extract"):
        train_study(study, receipt, settings=study_at(tmp_path / "other").settings)


def test_features_of_another_method_are_accepted(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="fpt", features={"importance": "class_token", "dtype": "int8"})
    receipt = study.extract()
    train_study(study, receipt, settings=study_at(tmp_path / "other").settings)
    assert load_bundle(tmp_path / "model").spec.features == receipt.spec


def test_its_cost_is_that_of_the_trained_network(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    cost = estimate_cost(study.settings, study.lpm, 3)
    assert METHODS["alf"].reads(study.settings) == {"statistics"}
    row_mib = 2 * features_of(study).segments[-1].stop / 2**20
    labels_mib = 8 / 2**20
    assert cost.train_batch_mib == pytest.approx(study.settings.train.batch_size * (row_mib + labels_mib))
    train_study(study, study.extract())
    assert cost.learnable == load_bundle(tmp_path / "model").spec.learnable
    assert cost.train_tensor_mib > cost.train_states_mib > 0
