"""Baselines from the same store: trained, bundled and judged like every other method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study import Study, make_study, predict, train_study

from schemas.errors import BundleError, CacheMismatchError, TrainingError
from schemas.features import ExtractionReceipt
from schemas.methods import METHODS, Method
from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.lpm.loading import describe_lpm
from stages.methods.attentive import AttentiveProbe
from stages.methods.base import ClosedFormMethod, GradientMethod, method_of
from stages.methods.batch import Batch
from stages.store.reader import open_store
from stages.train.bundle import load_bundle
from stages.train.bundle_spec import encode_spec, read_spec
from stages.train.cost import estimate_cost
from stages.train.data import EpochSampler, FeatureDataset, Reading, batches
from stages.train.fit_cost import count_rows
from stages.train.infer import source_logits
from stages.train.job import Watch
from stages.train.trainer import train

PROBES: tuple[Method, ...] = ("statistics", "linear", "knn", "attentive")
LOOP = {"epochs": 12, "lr": 2e-3, "prompts": 4}


def as_method(study: Study, method: Method) -> ResolvedSettings:
    return study.settings.model_copy(update={"method": method})


@pytest.mark.parametrize("method", PROBES)
def test_a_baseline_learns_and_predicts_what_it_is_judged_by(tmp_path: Path, method: Method) -> None:
    study = make_study(tmp_path, method=method, train=LOOP)
    receipt = study.extract()
    logs: list[EpochLog] = []
    result = train_study(study, receipt, watch=Watch(on_epoch=lambda _, log: logs.append(log)))
    assert tuple(logs) == result.epochs
    assert result.best.val_auc is not None
    assert result.best.val_auc > 0.9
    metrics = evaluate(study.files(receipt), tmp_path / "model", tmp_path / "evaluation")
    assert metrics.auc is not None
    assert metrics.auc > 0.9
    table = read_predictions(tmp_path / "evaluation/predictions.parquet")
    spec = load_bundle(tmp_path / "model").spec
    assert table.model is not None
    assert (table.model.method, table.model.weights_sha256) == (method, spec.weights_sha256)
    images = [tmp_path / "images" / row.path for row in table.rows]
    rows = predict(tmp_path / "model", images, study.settings.lpm, study.root, batch_size=3)
    for row, expected in zip(rows, table.probabilities, strict=True):
        assert row.probabilities is not None
        np.testing.assert_allclose(list(row.probabilities.values()), expected, atol=2e-3)
    assert "Learnable parameters" in (tmp_path / "evaluation/report.html").read_text()


@pytest.mark.parametrize("method", PROBES)
def test_the_bundle_gives_the_validation_loss_of_training(tmp_path: Path, method: Method) -> None:
    study = make_study(tmp_path, method=method, train={"epochs": 3})
    receipt = study.extract()
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "lpm.safetensors").unlink()
    result = train_study(study, receipt)
    bundle = load_bundle(tmp_path / "model")
    # Only neighbours have no vector that a head reads, and no statistics of it.
    source = set() if method == "knn" else {"source.safetensors"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.json", "model.safetensors"} | source
    assert json.loads((tmp_path / "model/model.json").read_text())["network"]["method"] == method
    assert bundle.spec.learnable == result.learnable
    assert (result.learnable == 0) == (method == "knn")
    rows = list(study.manifest.of("val"))
    logits = source_logits(bundle, open_store(study.cache, receipt), [row.id for row in rows])
    target = torch.tensor([study.manifest.classes.index(row.label) for row in rows])
    loss = float(torch.nn.functional.cross_entropy(logits, target))
    if method == "statistics":
        # Its regressions have learnt from these images; training judged by others that had not.
        assert loss < 0.8 * result.best.val_loss
    else:
        assert loss == pytest.approx(result.best.val_loss, abs=1e-5)
    first = (tmp_path / "model/model.safetensors").read_bytes()
    train_study(study, receipt, "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == first


@pytest.mark.parametrize("method", PROBES)
def test_a_baseline_uses_the_features_of_another_method(tmp_path: Path, method: Method) -> None:
    study = make_study(tmp_path, method="fpt", features={"importance": "class_token"})
    receipt = study.extract()
    other = make_study(tmp_path / "other", method=method, features={"importance": "class_token", "side_image_size": 64})
    assert other.settings.features.layers != receipt.spec.layers
    train_study(study, receipt, settings=other.settings)
    spec = load_bundle(tmp_path / "model").spec
    assert spec.features == receipt.spec
    with pytest.raises(CacheMismatchError, match="image_size"):
        larger = describe_lpm("test_vit", 96)
        image = other.settings.features.model_copy(update={"image_size": 96})
        changed = other.settings.model_copy(update={"features": image})
        train(changed, study.files(receipt, lpm=larger), tmp_path / "x", tmp_path / "checkpoints")


def test_only_what_reads_tokens_minds_how_they_are_kept(study: Study) -> None:
    receipt = study.extract()
    features = study.settings.features.model_copy(update={"importance": "class_token", "dtype": "int8"})
    settings = study.settings.model_copy(update={"features": features})
    for method in ("linear", "knn", "statistics"):
        train_study(study, receipt, method, settings=settings.model_copy(update={"method": method}))
    with pytest.raises(CacheMismatchError, match="importance"):
        train_study(study, receipt, settings=settings.model_copy(update={"method": "attentive"}))


@pytest.mark.parametrize("method", ["statistics", "linear", "knn"])
def test_features_without_pooled_outputs_are_refused(tmp_path: Path, method: Method) -> None:
    study = make_study(tmp_path, features={"pooled": False})
    receipt = study.extract()
    with pytest.raises(CacheMismatchError, match=r"features\.pooled: true.*fpt extract"):
        train_study(study, receipt, settings=as_method(study, method))
    train_study(study, receipt, settings=as_method(study, "attentive"))


@pytest.mark.parametrize("method", PROBES)
def test_every_view_of_a_training_image_is_read(tmp_path: Path, method: Method) -> None:
    study = make_study(tmp_path, features={"views": ("identity", "hflip")}, train={"epochs": 1})
    receipt = study.extract()
    both = as_method(study, method)
    one = study.changed(features={"views": ("identity",)}).model_copy(update={"method": method})
    train_study(study, receipt, "both", settings=both)
    train_study(study, receipt, "one", settings=one)
    both_weights, one_weights = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "one"))
    assert both_weights != one_weights
    if method == "knn":
        rows = [load_bundle(tmp_path / name).spec.network for name in ("both", "one")]
        assert rows[0].rows == 2 * rows[1].rows


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_labels_of_validation_images_choose_nothing(tmp_path: Path, method: Method) -> None:
    study = make_study(tmp_path, method=method)
    receipt = study.extract()
    first = train_study(study, receipt, "first")
    turned = dict(zip(study.manifest.classes, study.manifest.classes[1:] + study.manifest.classes[:1], strict=True))
    rows = tuple(
        row.model_copy(update={"label": turned[row.label]}) if row.split == "val" else row
        for row in study.manifest.rows
    )
    study.manifest = study.manifest.model_copy(update={"rows": rows})
    second = train_study(study, receipt, "second")
    assert second.best.val_loss > first.best.val_loss
    assert second.chosen == first.chosen
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_a_class_without_training_images_is_named(study: Study) -> None:
    receipt = study.extract()
    rows = tuple(row for row in study.manifest.rows if row.label != "grid" or row.split != "train")
    study.manifest = study.manifest.model_copy(update={"rows": rows})
    with pytest.raises(TrainingError, match="grid"):
        train_study(study, receipt, settings=as_method(study, "linear"))


def test_a_bundle_of_another_kind_is_refused(study: Study) -> None:
    receipt = study.extract()
    train_study(study, receipt, "linear", settings=as_method(study, "linear"))
    train_study(study, receipt, "knn", settings=as_method(study, "knn"))
    folder = study.root / "linear"
    ours, other = read_spec(folder), read_spec(study.root / "knn")
    (folder / "model.json").write_bytes(encode_spec(ours.model_copy(update={"network": other.network})))
    with pytest.raises(BundleError, match="does not fit"):
        load_bundle(folder)
    shutil.copy(study.root / "knn/model.json", folder)
    with pytest.raises(BundleError, match=r"is not the file that model\.json describes"):
        load_bundle(folder)


def test_the_attentive_probe_is_softmax_attention_head_by_head(study: Study) -> None:
    receipt = study.extract()
    train_study(study, receipt, settings=as_method(study, "attentive"))
    probe = load_bundle(study.root / "model").network
    assert isinstance(probe, AttentiveProbe)
    row = study.manifest.rows[0].id
    stored = open_store(study.cache, receipt).read([row], ["keys", "values"])
    keys, values = (torch.from_numpy(stored[name][0]).double() for name in ("keys", "values"))
    parts = []
    for layer, queries in enumerate(probe.queries.detach().double()):
        for query in queries.view(len(queries), keys.shape[1], -1):
            scores = torch.einsum("hd,hjd->hj", query, keys[layer]) / keys.shape[-1] ** 0.5
            found = torch.einsum("hj,hjd->hd", scores.softmax(dim=1), values[layer]).flatten()
            parts.append((found - found.mean()) / (found.var(unbiased=False) + 1e-5).sqrt())
    expected = torch.cat(parts) @ probe.head.weight.detach().double().T + probe.head.bias.detach().double()
    found = source_logits(load_bundle(study.root / "model"), open_store(study.cache, receipt), [row])[0]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_attentive_probe_costs_less_than_a_side_network(study: Study) -> None:
    attentive, plus = (
        estimate_cost(as_method(study, method), study.lpm, 3, study.root) for method in ("attentive", "fpt+")
    )
    train_study(study, study.extract(), settings=as_method(study, "attentive"))
    assert attentive.learnable == load_bundle(study.root / "model").spec.learnable
    assert attentive.train_tensor_mib is not None
    assert plus.train_tensor_mib is not None
    assert 0 < attentive.train_tensor_mib < plus.train_tensor_mib
    assert attentive.fit is None


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, ExtractionReceipt]:
    """A study with two views of each training image, and its features."""
    study = make_study(tmp_path_factory.mktemp("viewed"), features={"views": ("identity", "hflip")})
    return study, study.extract()


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.closed_form])
def test_the_cost_of_a_fit_is_what_the_bundle_holds(viewed: tuple[Study, ExtractionReceipt], method: Method) -> None:
    study, receipt = viewed
    settings = as_method(study, method)
    counts = count_rows(study.manifest, settings.features)
    cost = estimate_cost(settings, study.lpm, 3, study.root, counts)
    result = train_study(study, receipt, method, settings)
    tensors = load_file(study.root / method / "model.safetensors").values()
    assert cost.fit is not None
    assert cost.learnable == cost.fit.coefficients == result.learnable
    assert cost.fit.kept_mib == pytest.approx(sum(one.nbytes for one in tensors) / 2**20)
    assert cost.fit.rows == 2 * len(list(study.manifest.of("train"))) + len(list(study.manifest.of("val")))
    assert (cost.train_tensor_mib, cost.pme_factor) == (None, None)
    unknown = estimate_cost(settings, study.lpm, 3, study.root).fit
    assert unknown == cost.fit.model_copy(update={"rows": None, "read_mib": None, "kept_mib": None})


def test_the_cost_of_an_ensemble_lists_its_linear_probes(study: Study) -> None:
    settings = study.changed(train={**LOOP, "members": 1, "epochs": 1}).model_copy(update={"method": "fpt-x"})
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"probe_weight": 0.5})})
    cost = estimate_cost(settings, study.lpm, 3, study.root, count_rows(study.manifest, settings.features))
    result = train_study(study, study.extract(), settings=settings)
    probe = {key: value for key, value in load_file(study.root / "model/model.safetensors").items() if "probe." in key}
    assert cost.fit is not None
    assert cost.learnable == result.learnable
    assert cost.fit.coefficients == probe["probe.weight"].numel() + probe["probe.bias"].numel()
    assert cost.fit.kept_mib == pytest.approx(sum(one.nbytes for one in probe.values()) / 2**20)
    assert cost.train_tensor_mib is not None


def test_every_method_is_in_every_table() -> None:
    for name, row in METHODS.items():
        assert row.name == name
        assert row.title
        assert row.help
        method = method_of(name)
        assert isinstance(method, ClosedFormMethod if row.closed_form else GradientMethod)


@pytest.mark.slow
def test_workers_hand_out_batches_without_images(study: Study) -> None:
    store = open_store(study.cache, study.extract())
    rows = list(study.manifest.rows)
    for method in PROBES:
        data = FeatureDataset(store, [row.id for row in rows], list(range(len(rows))), Reading(METHODS[method].inputs))
        sampler = EpochSampler(len(data), 5, seed=1)
        alone = [copied(batch) for batch in batches(data, sampler)]
        helped = [copied(batch) for batch in batches(data, sampler, workers=1)]
        for left, right in zip(alone, helped, strict=True):
            inputs = METHODS[method].inputs
            expected = {"pooled", "statistics"} & inputs | ({"keys"} if "tokens" in inputs else set())
            assert left.keys() == right.keys() == expected | {"labels"}
            assert all(torch.equal(left[name], right[name]) for name in left)


def copied(batch: Batch) -> dict[str, torch.Tensor]:
    found = {"side": batch.side, "pooled": batch.pooled, "statistics": batch.statistics, "labels": batch.labels}
    if batch.tokens is not None:
        found["keys"] = batch.tokens.keys
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("method", PROBES)
def test_pooled_outputs_that_are_there_may_be_unwanted(study: Study, method: Method) -> None:
    receipt = study.extract()
    train_study(
        study, receipt, settings=study.changed(features={"pooled": False}).model_copy(update={"method": method})
    )
