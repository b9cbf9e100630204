"""FPT-X: members that read together learn as they would alone, and the probe joins their average."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import spec as feature_spec
from study import Study, make_study

from schemas.errors import SettingsError
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.results import EpochLog, TrainResult
from schemas.specs import SideNetworkSpec
from schemas.statistics import ProbeSource
from stages.evaluate.evaluator import evaluate
from stages.extract.features import compute_features, to_pixels
from stages.groups import cluster_of
from stages.images import read_image
from stages.lpm.loading import load_lpm
from stages.methods.attentive import AttentiveProbe
from stages.methods.base import FitInputs, Network, build_model, gradient_method, learnable_parameters
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.calibration import inverse_temperatures
from stages.methods.fit_rows import describe_rows
from stages.methods.fpt import PromptedSideNetwork
from stages.methods.fpt_x import Ensemble, _attentive_spec
from stages.methods.statistics import StatisticsFit, StatisticsProbe, fit_statistics, select
from stages.store.reader import open_store
from stages.train import gradient
from stages.train.bundle import load_bundle
from stages.train.checkpoints import Fit
from stages.train.infer import feature_logits, source_logits
from stages.train.job import SPLITS, Watch
from stages.train.loop import Recipe, Run, keep_epoch, make_optimizer, training_step
from stages.train.trainer import train, train_together

SHAPE = {"classes": 3, "layers": 3, "lpm_width": 32, "heads": 2, "width": 8, "image_size": 32, "prompts": 4}
SOURCES = (
    ProbeSource(name="pooled outputs", spans=((0, 64),)),
    ProbeSource(name="first and last", spans=((64, 70), (80, 84))),
    ProbeSource(name="last", spans=((80, 84),)),
)
"""Of rows of 64 pooled outputs and 20 statistics."""
READ = 64 + 10 + 4
"""Numbers of all sources."""


def tiny(
    members: int, weight: float, dropout: float = 0.0, method: str = "fpt-x", attentive: int = 0, share: float = 0.0
) -> SideNetworkSpec:
    pool: dict[str, Any] = {
        "members": members,
        "probe_weight": weight,
        "attentive": attentive,
        "attentive_weight": share,
    }
    pool["sources"] = SOURCES if weight else ()
    return SideNetworkSpec.model_validate({**SHAPE, "method": method, "dropout": dropout, **pool})


def batch(seed: int, size: int = 5) -> Batch:
    g = torch.Generator().manual_seed(seed)
    cached = CachedTokens(*(torch.randn(size, 3, 2, 7, 16, generator=g) for _ in range(2)))
    images = torch.randint(0, 256, (size, 3, 32, 32), generator=g, dtype=torch.uint8)
    pooled, statistics = torch.randn(size, 2, 32, generator=g), torch.randn(size, 20, generator=g).half()
    return Batch(torch.arange(size) % 3, side=images, tokens=cached, pooled=pooled, statistics=statistics)


def prepared(seed: int, size: int = 5) -> Batch:
    return batch(seed, size).prepared(feature_spec("float32"))


def build_network(spec: SideNetworkSpec) -> Network:
    network = build_model(spec)
    assert isinstance(network, Network)
    return network


def recipe(**keys: Any) -> Recipe:
    settings = parse_settings({"train": {"lr": 1e-2, "clip_norm": 0.05, **keys}}).train
    return Recipe(settings, feature_spec("float32"), None, torch.device("cpu"), 0)


def fill(probe: StatisticsProbe) -> None:
    for name in ("weight", "bias", "mean"):
        getattr(probe, name).normal_()
    probe.scale.uniform_(0.5, 2.0)
    probe.share.copy_(torch.rand(len(SOURCES)).softmax(0))


def said_by(probe: StatisticsProbe, rows: torch.Tensor) -> torch.Tensor:
    """(B, C), source by source."""
    total, first = torch.zeros(len(rows), 3), 0
    for source, share, bias in zip(SOURCES, probe.share, probe.bias, strict=True):
        part = slice(first, first + source.width)
        x = (select(rows, source) - probe.mean[part]) / probe.scale[part]
        total += share * torch.nn.functional.linear(x, probe.weight[:, part], bias).softmax(-1).log()
        first += source.width
    return total


def as_run(network: Any, optimizer: Any, setting: Recipe) -> Run:
    return Run(Fit(network, optimizer), setting, Path(), lambda _: None)


def test_members_learn_what_they_would_learn_alone() -> None:
    torch.manual_seed(0)
    together = build_network(tiny(3, 0.3, attentive=2, share=0.2))
    assert isinstance(together, Ensemble)
    probes = [AttentiveProbe(_attentive_spec(together.spec)) for _ in range(2)]
    alone: list[Network] = [*(PromptedSideNetwork(tiny(1, 0.0, method="fpt+")) for _ in range(3)), *probes]
    for network, member in zip(alone, together.members, strict=True):
        network.load_state_dict(member.state_dict())
    setting = recipe()
    optimizer = make_optimizer(together, setting.settings)
    optimizers = [make_optimizer(network, setting.settings) for network in alone]
    for step in range(4):
        (mean,) = training_step([as_run(together, optimizer, setting)], batch(step))
        losses = [
            training_step([as_run(network, own, setting)], batch(step))[0]
            for network, own in zip(alone, optimizers, strict=True)
        ]
        torch.testing.assert_close(mean, torch.stack(losses).mean())
    for network, member in zip(alone, together.members, strict=True):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(member.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_members_differ_by_initialisation_and_dropout() -> None:
    torch.manual_seed(0)
    network = build_network(tiny(2, 0.0, dropout=0.5))
    first, second = network.members
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    second.load_state_dict(first.state_dict())
    own = prepared(0)
    network.train()
    logits = network.member_logits(network.members, own)
    assert not torch.allclose(logits[0], logits[1])
    network.eval()
    logits = network.member_logits(network.members, own)
    torch.testing.assert_close(logits[0], logits[1])


def test_the_answer_is_the_weighted_mean_of_log_probabilities() -> None:
    torch.manual_seed(0)
    network = build_network(tiny(2, 0.25, attentive=2, share=0.35))
    assert isinstance(network, Ensemble)
    assert network.probe is not None
    fill(network.probe)
    network.sharpness.copy_(torch.tensor([0.5, 0.1, 2.0]))
    for member in network.attentive:
        member.head.weight.data.normal_()  # type: ignore[operator, union-attr]
    own = prepared(0)
    with torch.no_grad():
        found = network.eval()(own)
        parts = [member(own).softmax(-1).log() for member in network.members]
        probe = said_by(network.probe, describe_rows(own)).log_softmax(-1)
    torch.testing.assert_close(found, 0.2 * (parts[0] + parts[1]) / 2 + 0.035 * (parts[2] + parts[3]) / 2 + 0.5 * probe)
    with pytest.raises(ValueError, match="pooled"):
        network(replace(own, pooled=None, statistics=None))


def test_before_training_it_ranks_as_the_probe_does() -> None:
    torch.manual_seed(0)
    network = build_network(tiny(4, 0.3, attentive=2, share=0.3))
    assert isinstance(network, Ensemble)
    assert network.probe is not None
    fill(network.probe)
    own = prepared(1, 12)
    with torch.no_grad():
        for member in network.networks:
            member.side.head.weight.zero_()
        found = network.eval()(own)
        probe = said_by(network.probe, describe_rows(own)).log_softmax(-1)
    assert torch.equal(found.argsort(0), probe.argsort(0))


def test_one_member_without_a_probe_is_the_published_network() -> None:
    assert isinstance(build_network(tiny(1, 0.0)), PromptedSideNetwork)
    one = learnable_parameters(build_network(tiny(1, 0.0)))
    assert learnable_parameters(build_network(tiny(4, 0.3))) == 4 * one + 3 * READ + 3 * len(SOURCES)
    probe = learnable_parameters(AttentiveProbe(_attentive_spec(tiny(1, 0.0))))
    assert learnable_parameters(build_network(tiny(1, 0.0, attentive=2, share=0.5))) == one + 2 * probe


def test_validation_images_calibrate_each_expert() -> None:
    torch.manual_seed(0)
    network = build_network(tiny(1, 0.3, attentive=1, share=0.2))
    assert isinstance(network, Ensemble)
    labels = torch.arange(300) % 3
    honest = torch.randn(300, 3) + 1.5 * torch.nn.functional.one_hot(labels, 3)
    # 1.5 z is the log-odds of z ~ N(1.5, 1) against N(0, 1): that expert is as sure as it may be.
    experts = torch.stack([1.5 * honest, 15.0 * honest, 0.15 * honest], dim=1).log_softmax(-1)
    pooled = network.calibrate(experts, labels)
    assert network.sharpness.tolist() == pytest.approx([1.0, 0.1, 10.0], rel=0.2)
    shares = torch.tensor([0.5, 0.2, 0.3])
    torch.testing.assert_close(pooled, (experts * (shares * network.sharpness)[:, None]).sum(1))
    assert network.state_dict()["sharpness"].tolist() == network.sharpness.tolist()
    # Three images cannot make an expert ten times as sure, none leaves it as it is.
    assert 0.5 < float(inverse_temperatures(15.0 * honest[:0, None], labels[:0])) < 2.0
    assert float(inverse_temperatures(torch.tensor([[[4.0, 0.0, 0.0]]]), torch.tensor([0]))) < 1.5
    # Thirty images that are all predicted well: the prior keeps a sure expert from becoming certain.
    terms, wins = torch.tensor([[[2.0, 0.0, 0.0]]]).expand(30, 1, 3), torch.zeros(30, dtype=torch.long)
    assert 1.0 < float(inverse_temperatures(terms, wins)) < 2.0 < float(inverse_temperatures(terms, wins, prior=1.0))


def run(study: Study, output: str, **train_keys: Any) -> TrainResult:
    receipt = study.extract()
    settings = study.changed(train=train_keys) if train_keys else study.settings
    return train(settings, study.files(receipt), study.root / output, study.root / "checkpoints")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("ensemble"), method="fpt-x", train={"epochs": 3, "members": 2})


def test_what_auto_means(study: Study) -> None:
    raw = parse_settings({"method": "fpt-x", "lpm": {"name": "test_vit"}, "train": {"side_reduction": 4}})
    train_settings = resolve(raw, study.lpm).train
    assert (train_settings.members, train_settings.adaptive_members) == (3, True)
    assert (train_settings.probe_weight, train_settings.keep) == (0.7, "late")
    assert (train_settings.attentive, train_settings.attentive_weight) == (0, 0.0)
    raw = parse_settings({"method": "fpt-x-kept", "lpm": {"name": "test_vit"}, "train": {"side_reduction": 4}})
    kept = resolve(raw, study.lpm).train
    assert (kept.members, kept.probe_weight, kept.attentive, kept.attentive_weight) == (5, 0.5, 1, 0.1)
    raw = parse_settings({"method": "fpt+", "lpm": {"name": "test_vit"}, "train": {"side_reduction": 4}})
    published = resolve(raw, study.lpm).train
    assert (published.members, published.probe_weight, published.keep) == (1, 0.0, "best")
    assert (published.attentive, published.attentive_weight) == (0, 0.0)


@pytest.mark.parametrize(
    ("method", "keys", "named"),
    [
        ("fpt+", {"attentive_weight": 0.3}, "with 0 attentive probes"),
        ("fpt+", {"attentive": 2, "attentive_weight": 0.0}, "is 0 with 2 attentive probes"),
        ("side", {"attentive": 1}, "reads no cached tokens"),
        ("fpt-x-kept", {"attentive_weight": 0.7, "probe_weight": 0.3}, "leave nothing for the side networks"),
    ],
)
def test_a_pool_without_sense_is_refused(study: Study, method: str, keys: dict[str, Any], named: str) -> None:
    raw = {"method": method, "lpm": {"name": "test_vit"}, "train": {"side_reduction": 4, **keys}}
    with pytest.raises(SettingsError, match=named):
        resolve(parse_settings(raw), study.lpm)


def test_attentive_probes_can_join_the_published_network(study: Study) -> None:
    raw = parse_settings(
        {"method": "fpt+", "lpm": {"name": "test_vit"}, "train": {"side_reduction": 4, "attentive": 2}}
    )
    assert resolve(raw, study.lpm).train.attentive_weight == 0.1


def test_it_is_trained_kept_and_judged_as_a_whole(study: Study) -> None:
    result = run(study, "model")
    late = result.epochs[1:]
    assert result.best == max(late, key=lambda log: (log.val_auc, -log.val_loss))
    bundle = load_bundle(study.root / "model")
    assert isinstance(bundle.network, Ensemble)
    shares = tuple(round(share, 4) for share in bundle.network.shares.tolist())
    asked = gradient_method("fpt-x").spec(study.settings, study.lpm, 3)
    held_out = bundle.network.held_out
    assert held_out is not None
    assert bundle.spec.network == asked.model_copy(update={"shares": shares, "held_out": held_out})
    assert sum(shares) == pytest.approx(1.0)
    ((name, described), *_) = gradient_method("fpt-x").describe(bundle.spec.network)
    assert (name, described) == ("Averaged", f"2 side networks ({shares[0]:g}), linear probes ({shares[1]:g})")
    assert bundle.network.probe is not None
    assert float(bundle.network.probe.weight.abs().sum()) > 0
    receipt = study.extract()
    rows = list(study.manifest.of("val"))
    reader = open_store(study.cache, receipt)
    logits = source_logits(bundle, reader, [row.id for row in rows])
    target = torch.tensor([study.manifest.classes.index(row.label) for row in rows])
    loss = float(torch.nn.functional.cross_entropy(logits, target))
    # The linear probes have learnt from these images; training judged by probes that had not.
    assert loss < result.best.val_loss - 1e-3
    lpm = load_lpm(study.settings.lpm, 64, study.root)
    image = read_image(study.root / "images" / rows[0].path, max_pixels=10**6)
    features = compute_features(lpm, receipt.spec, [to_pixels(image, receipt.spec)])
    torch.testing.assert_close(feature_logits(bundle, features.arrays)[0], logits[0], rtol=0, atol=0.02)
    metrics = evaluate(study.files(receipt), study.root / "model", study.root / "evaluation")
    assert metrics.images == len(list(study.manifest.of("test")))


def test_workers_change_nothing(study: Study) -> None:
    calm = run(study, "a")
    settings = study.settings
    study.settings = study.changed(compute={"loader_workers": 1}, store={"memory_budget": 0})
    try:
        again = run(study, "b")
    finally:
        study.settings = settings
    assert [log.val_loss for log in again.epochs] == [log.val_loss for log in calm.epochs]


def logged(epoch: int, auc: float) -> EpochLog:
    return EpochLog(epoch=epoch, train_loss=1.0, val_loss=1.0, val_auc=auc, val_accuracy=0.5, lr=0.1, seconds=1.0)


@pytest.mark.parametrize(("keep", "kept"), [("best", 1), ("late", 3), ("last", 4)])
def test_which_epoch_is_kept(keep: str, kept: int) -> None:
    network = build_network(tiny(1, 0.0))
    setting = recipe(keep=keep, epochs=4)
    run = as_run(network, make_optimizer(network, setting.settings), setting)
    for epoch, auc in enumerate((0.9, 0.6, 0.8, 0.7), start=1):
        torch.nn.init.constant_(network.side.head.bias, epoch)  # type: ignore[union-attr, arg-type]
        keep_epoch(run, logged(epoch, auc))
    assert run.state.best == kept
    assert run.state.best_state["side.head.bias"].tolist() == [kept] * 3


def test_the_best_epoch_can_be_kept_instead(study: Study) -> None:
    result = run(study, "best", keep="best", members=3)
    assert result.best == max(result.epochs, key=lambda log: (log.val_auc, -log.val_loss))
    assert len(load_bundle(study.root / "best").network.members) == 3


@pytest.mark.parametrize("name", ["pooled", "statistics"])
def test_a_probe_without_what_it_reads_is_refused(study: Study, name: str) -> None:
    raw: dict[str, Any] = {
        "method": "fpt-x",
        "lpm": {"name": "test_vit"},
        "features": {name: False},
        "train": {"side_reduction": 4},
    }
    with pytest.raises(SettingsError, match=rf"features\.{name}"):
        resolve(parse_settings(raw), study.lpm)
    raw["train"] = {"side_reduction": 4, "probe_weight": 0.0}
    without = resolve(parse_settings(raw), study.lpm).train
    # Nothing to compare a first network with: all are trained.
    assert (without.members, without.adaptive_members) == (3, False)


def test_it_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="fpt-x", train={"epochs": 3, "members": 2})
    receipt = study.extract()

    class Killed(BaseException):
        pass

    def die(_: int, log: Any) -> None:
        if log.epoch == 1:
            raise Killed

    places = (study.settings, study.files(receipt))
    train(*places, study.root / "calm", study.root / "checkpoints")
    with pytest.raises(Killed):
        train(*places, study.root / "killed", study.root / "checkpoints", Watch(on_epoch=die))
    assert train(*places, study.root / "killed", study.root / "checkpoints").resumed_from == 1
    assert (study.root / "calm/model.safetensors").read_bytes() == (
        study.root / "killed/model.safetensors"
    ).read_bytes()


def test_runs_of_one_pass_share_the_fit_of_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, method="fpt-x", train={"epochs": 1, "members": 1, "attentive": 0})
    fits = []

    def counted(inputs: FitInputs) -> tuple[StatisticsFit, torch.Tensor]:
        units = cluster_of(study.manifest)
        for rows, split in zip((inputs.train, inputs.val), SPLITS, strict=True):
            assert rows.groups == [units[row.path] for row in study.manifest.of(split)]
        found = fit_statistics(inputs)
        fits.append(found[0])
        return found

    monkeypatch.setattr(gradient, "fit_statistics", counted)
    weighted = {"class_weights": (1.0, 2.0, 3.0)}
    variants = [study.changed(train={"order_seed": 0, **keys}) for keys in ({}, {"lr": 1e-3}, weighted)]
    outputs = [tmp_path / str(number) for number in range(3)]
    train_together(variants, study.files(study.extract()), outputs, tmp_path / "checkpoints")
    assert len(fits) == 2
    for output, fit in zip(outputs, (fits[0], fits[0], fits[1]), strict=True):
        network = load_bundle(output).network
        assert isinstance(network, Ensemble)
        assert network.probe is not None
        torch.testing.assert_close(network.probe.weight, fit.weight)
    assert not torch.equal(fits[0].weight, fits[1].weight)


@pytest.mark.parametrize("method", ["fpt-x", "fpt-x-kept"])
def test_its_side_networks_are_those_of_the_tnnls_paper(method: str) -> None:
    """Prompts of the LPM's width, as in `fpt+`: equal parameters, name by name."""
    of_one = dict(PromptedSideNetwork(tiny(1, 0.0, method="fpt+")).named_parameters())
    network = build_network(tiny(2, 0.5, method=method))
    assert isinstance(network, Ensemble)
    for member in network.members:
        assert {name: value.shape for name, value in member.named_parameters()} == {
            name: value.shape for name, value in of_one.items()
        }
