"""Prompts in the LPM and in side networks, the vectors that heads read, and statistics of source images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study import Study, make_images, make_study

import stages.methods.joint_attention as joint_attention
import stages.predict.classifier as classifier
from schemas.errors import BundleError, CacheMismatchError, EvaluationError
from schemas.features import ExtractionReceipt
from schemas.methods import METHODS, model_inputs
from schemas.parse import parse_settings
from schemas.resolve import feature_spec, resolve
from schemas.results import BundleSpec
from schemas.specs import AdaptationSpec
from schemas.test_time import AdaptOptions
from stages.lpm.loading import describe_lpm
from stages.methods.base import Network, gradient_method
from stages.methods.batch import Batch, array_names
from stages.methods.fpt import PromptedSideNetwork
from stages.predict.adapted import adapted_probabilities
from stages.predict.classifier import load_classifier
from stages.store.reader import open_store
from stages.test_time.collect import ensure_source, read_batch
from stages.test_time.stream import AdaptContext, adapted_logits
from stages.test_time.targets import LpmTarget, SideTarget, check_adaptable, open_target
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import bundle_logits
from stages.train.source_statistics import SOURCE, add_source, encode, later_folder, moments_of, read_source
from stages.train.trainer import train

ADAPTATIONS = [name for name, row in METHODS.items() if row.spec is AdaptationSpec]
BOUND = {"ept", "ept-lse", "attn-scale-matrix"}
"""Adaptations with parameters per token."""
SMALL = {"lora": {"rank": 4}, "vera": {"rank": 16}, "ept": {"prompts": 3}}


def adapted_model(name: str) -> Bundle:
    """An adaptation of all blocks of timm's tiny ViT, with random values in place of zeros."""
    lpm = describe_lpm("test_vit", 64)
    section = METHODS[name].settings_section
    methods = {section: SMALL[section]} if section in SMALL else {}
    raw = {"method": name, "lpm": {"name": "test_vit"}, "features": {"image_size": 64}, "methods": methods}
    settings = resolve(parse_settings(raw), lpm)
    torch.manual_seed(0)
    network: Any = gradient_method(name).build(gradient_method(name).spec(settings, lpm, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    spec = BundleSpec.model_construct(network=network.spec, features=feature_spec(settings, lpm, "ab" * 32))
    return Bundle(spec, network.eval())


@torch.inference_mode()
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_prompts_enter_an_adapted_lpm_and_leave_it(name: str) -> None:
    bundle = adapted_model(name)
    info = bundle.spec.features.lpm
    if name in BOUND:
        with pytest.raises(EvaluationError, match="for each token"):
            check_adaptable("foa", bundle.spec, bundle.network)
    else:
        check_adaptable("foa", bundle.spec, bundle.network)
    check_adaptable("vptta", bundle.spec, bundle.network)
    target = open_target(bundle, None)
    assert isinstance(target, LpmTarget)
    batch = Batch(torch.zeros(3, dtype=torch.int64), image=torch.randn(3, 3, 64, 64, generator=torch.manual_seed(1)))
    activations, vectors = target.run(target.begin(batch), None)
    assert activations.shape == (3, info.depth * info.width)
    torch.testing.assert_close(target.logits(vectors), bundle.network(batch))
    torch.testing.assert_close(activations[:, -info.width :], vectors)
    if name not in BOUND:
        candidate = torch.randn(target.numbers, generator=torch.manual_seed(2))
        prompted, moved = target.run(batch, candidate)
        assert (prompted - activations).abs().max() > 1e-3 and (moved - vectors).abs().max() > 1e-3
    assert torch.equal(target.run(batch, None)[1], vectors), "nothing of the prompts is left"
    mean, variance = target.norms(batch.image[:1])  # type: ignore[index]
    assert mean.shape == variance.shape == (2 * info.depth + 1, info.width)
    torch.testing.assert_close(target.predict(batch.image), bundle.network(batch))  # type: ignore[arg-type]


@torch.inference_mode()
def test_prompts_by_hand() -> None:
    bundle = adapted_model("bitfit")
    lpm: Any = bundle.network.lpm  # type: ignore[attr-defined]
    image = torch.randn(2, 3, 64, 64, generator=torch.manual_seed(1))
    candidate = torch.randn(3 * lpm.embed_dim, generator=torch.manual_seed(2))
    x = lpm.norm_pre(lpm.patch_drop(lpm._pos_embed(lpm.patch_embed(image))))
    x = torch.cat([x[:, :1], candidate.view(1, 3, -1).expand(2, -1, -1), x[:, 1:]], dim=1)
    expected = []
    for number, block in enumerate(lpm.blocks):
        x = block(x)
        after = lpm.blocks[number + 1].norm1 if number + 1 < len(lpm.blocks) else lpm.norm
        expected.append(after(x)[:, 0])
    target = open_target(bundle, None)
    found, vectors = target.run(Batch(torch.zeros(2, dtype=torch.int64), image=image), candidate)
    torch.testing.assert_close(found, torch.cat(expected, dim=1))
    torch.testing.assert_close(vectors, expected[-1])


CACHED = ("linear", "nearest-mean", "knn", "mlp-3", "statistics", "alf", "attentive", "loff-ta", "fpt", "fpt+", "fpt-x",
          "side")  # fmt: skip
WITHOUT_PROMPTS = {"statistics", "alf", "attentive", "loff-ta", "knn"}


@dataclass
class Trained:
    study: Study
    receipt: ExtractionReceipt

    def model(self, method: str) -> Path:
        """Folder of the model of a method, trained when it is first asked for."""
        folder = self.study.root / method / "model"
        if not folder.exists():
            raw = self.study.settings.model_dump(mode="json")
            raw["train"] |= {"epochs": 1, "order_seed": 0, "adaptive_members": method == "fpt-x", "members": 1}
            if method == "fpt-x":
                raw["train"] |= {"members": 2, "adaptive_members": False, "probe_weight": 0.6}
            if method == "fpt":
                raw["train"] |= {"side_image_size": 32}
            settings = self.study.settings.model_validate({**raw, "method": method})
            train(settings, self.study.files(self.receipt), folder, self.study.root / "checkpoints")
        return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    study = make_study(tmp_path_factory.mktemp("study"), per_class=16, features={"hidden": 3})
    return Trained(study, study.extract())


@pytest.mark.parametrize("method", CACHED)
def test_heads_of_what_they_read_are_the_model(trained: Trained, method: str) -> None:
    bundle = load_bundle(trained.model(method))
    network, spec = bundle.network, bundle.spec
    source = read_source(trained.model(method), spec.weights_sha256)
    if method == "knn":
        assert not network.has_head and source == {}
        with pytest.raises(EvaluationError, match="foa-shift adapts every model"):
            check_adaptable("foa-shift", spec, network)
        return
    check_adaptable("foa-shift", spec, network)
    ids = sorted(row.id for row in trained.study.manifest.of("train"))
    reader = open_store(trained.study.cache, trained.receipt)
    batch = read_batch(reader, ids, array_names(model_inputs(spec.network)), spec.network.side_size)
    prepared = batch.prepared(spec.features)
    with torch.inference_mode():
        vectors = network.head_inputs(prepared)
        torch.testing.assert_close(network.head_logits(vectors), bundle_logits(bundle, batch), atol=1e-5, rtol=1e-5)
    # What training wrote are the statistics of its images.
    torch.testing.assert_close(source["vectors"].mean, vectors.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(source["vectors"].spread, vectors.std(0), atol=1e-4, rtol=1e-3)
    assert source["vectors"].images == len(ids)
    target = (
        open_target(bundle, None) if isinstance(network, Network) and "side" in model_inputs(spec.network) else None
    )
    assert ("activations" in source) == (target is not None)
    if method in WITHOUT_PROMPTS:
        with pytest.raises(EvaluationError, match="cannot be adapted by foa"):
            check_adaptable("foa", spec, network)
    if target is not None:
        assert isinstance(target, SideTarget)
        with torch.inference_mode():
            activations, again = target.run(target.begin(prepared), None)
        torch.testing.assert_close(again, vectors)
        torch.testing.assert_close(source["activations"].spread, activations.std(0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["fpt+", "fpt-x"])
def test_candidates_cost_passes_of_the_side_network_only(
    trained: Trained, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_images(tmp_path / "others", 8, seed=5)
    images = sorted((tmp_path / "others").rglob("*.png"))
    study, model = trained.study, trained.model(method)
    counts = {"lpm": 0, "side": 0, "contexts": 0}
    compute, vector, context = (
        classifier.compute_features,
        PromptedSideNetwork.head_vector,
        joint_attention.context,
    )

    def counted_features(lpm: Any, spec: Any, pixels: Any, device: Any) -> Any:
        counts["lpm"] += len(pixels)
        return compute(lpm, spec, pixels, device)

    def counted_vector(self: PromptedSideNetwork, state: torch.Tensor) -> torch.Tensor:
        counts["side"] += 1
        return vector(self, state)

    def counted_context(*args: Any) -> torch.Tensor:
        counts["contexts"] += 1
        return context(*args)

    monkeypatch.setattr(classifier, "compute_features", counted_features)
    monkeypatch.setattr(PromptedSideNetwork, "head_vector", counted_vector)
    monkeypatch.setattr(joint_attention, "context", counted_context)
    loaded = load_classifier(load_bundle(model), study.settings.lpm, study.root, study.settings.data)
    place = AdaptContext(model, study.root, study.settings.lpm, None)
    options = AdaptOptions(name="foa", batch=8)
    found = adapted_probabilities(loaded, images, options, place, batch_size=4)
    members = 2 if method == "fpt-x" else 1
    layers = loaded.bundle.spec.network.layers  # type: ignore[attr-defined]
    batches = 3
    assert counts["lpm"] == len(images) == 24
    assert counts["side"] == 28 * batches * members
    assert counts["contexts"] == 2 * layers * batches, "of the search, and of the model as it is"
    plain, adapted = (np.stack([one[side] for one in found]) for side in (0, 1))  # type: ignore[index]
    assert np.abs(plain - adapted).max() > 1e-4
    again = adapted_probabilities(loaded, images, options, place, batch_size=4)
    np.testing.assert_array_equal(np.stack([one[1] for one in again]), adapted)  # type: ignore[index]
    # From the cache the same, and no image is opened.
    np.testing.assert_allclose(adapted.sum(axis=1), 1, atol=1e-5)


def test_what_needs_the_lpm_is_computed_once_from_training_images(trained: Trained, tmp_path: Path) -> None:
    study, model = trained.study, tmp_path / "model"
    shutil.copytree(trained.model("linear"), model)
    bundle = load_bundle(model)
    ids = [row.id for row in study.manifest.of("test")]
    files = study.files(trained.receipt)
    options = AdaptOptions(name="foa", batch=8)
    with pytest.raises(BundleError, match="fpt evaluate --adapt vptta"):
        stranger = load_classifier(bundle, study.settings.lpm, study.root, study.settings.data)
        place = AdaptContext(model, study.root, study.settings.lpm, None)
        adapted_probabilities(stranger, [study.root] * 8, AdaptOptions(name="vptta"), place, 4)
    first = adapted_logits(bundle, files, model, ids, options)
    path = later_folder(model) / SOURCE
    written = path.stat().st_mtime_ns
    assert set(read_source(model, bundle.spec.weights_sha256)) == {"vectors", "activations"}
    assert torch.equal(adapted_logits(bundle, files, model, ids, options), first)
    assert path.stat().st_mtime_ns == written
    adapted_logits(bundle, files, model, ids, AdaptOptions(name="vptta"))
    assert set(read_source(model, bundle.spec.weights_sha256)) == {"vectors", "activations", "norms"}
    # Of another model they are passed over; damaged they are an error that names the file.
    (model / SOURCE).unlink()
    assert read_source(model, "ab" * 32) == {}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="damaged"):
        read_source(model, bundle.spec.weights_sha256)
    written_by_training = read_source(trained.model("linear"), bundle.spec.weights_sha256)
    add_source(model, bundle.spec.weights_sha256, written_by_training)
    assert set(read_source(model, bundle.spec.weights_sha256)) == set(written_by_training) == {"vectors"}


def test_cached_vectors_are_shifted_without_images_and_without_the_lpm(trained: Trained, tmp_path: Path) -> None:
    study = trained.study
    nowhere = study.settings.lpm.model_copy(update={"weights": "gone.safetensors"})
    data = study.settings.data.model_copy(update={"images": "gone"})
    files = study.files(trained.receipt, weights=nowhere, data=data)
    for method in ("linear", "statistics", "fpt+", "loff-ta"):
        model = trained.model(method)
        bundle = load_bundle(model)
        ids = [row.id for row in study.manifest.rows]
        found = adapted_logits(bundle, files, model, ids, AdaptOptions(name="foa-shift", batch=16))
        plain = bundle_logits(bundle, read_batch(
            open_store(study.cache, trained.receipt), ids, array_names(model_inputs(bundle.spec.network)),
            bundle.spec.network.side_size))  # fmt: skip
        changed = (found - plain).abs().amax(dim=1) > 1e-6
        assert int((~changed).sum()) == 16, "the first batch is not shifted"


def test_statistics_are_not_computed_from_other_features(trained: Trained, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained.model("fpt+"), model)
    (model / SOURCE).unlink()
    spec = trained.receipt.spec.model_copy(update={"kept": 1})
    receipt = trained.receipt.model_copy(update={"spec": spec, "fingerprint": spec.fingerprint})
    with pytest.raises(CacheMismatchError, match="kept"):
        ensure_source("foa-shift", model, load_bundle(model), None, trained.study.files(receipt))
    assert not later_folder(model).exists()


def test_too_few_images_are_refused(trained: Trained) -> None:
    model = trained.model("linear")
    ids = [row.id for row in trained.study.manifest.of("test")][:7]
    with pytest.raises(EvaluationError, match="at least 8 images, and there are 7"):
        adapted_logits(
            load_bundle(model), trained.study.files(trained.receipt), model, ids, AdaptOptions(name="foa-shift")
        )


def test_equal_statistics_are_equal_bytes() -> None:
    """So that DVC takes an equal training for the same model."""
    moments = {kind: moments_of([torch.ones(3, 2)]) for kind in ("vectors", "activations")}
    assert len({encode(moments, "0" * 64) for _ in range(20)}) == 1
