"""Ensemble weights of FPT-X, and what its training reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from study import make_study, train_study

from schemas.specs import SideNetworkSpec
from schemas.statistics import ProbeSource
from stages.losses import plain_loss
from stages.methods.base import gradient_method
from stages.methods.calibration import CONCENTRATION, fit_shares
from stages.methods.fpt_x import Ensemble
from stages.scores import log_pool_terms
from stages.train.bundle import load_bundle
from stages.train.bundle_spec import read_spec
from stages.train.data import FeatureDataset, Reading


def test_ensemble_weights_follow_the_held_out_loss_and_the_prior() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    good = 2.0 * torch.nn.functional.one_hot(labels, 3) + torch.randn(60, 3, generator=g)
    terms = log_pool_terms(torch.stack([torch.randn(60, 3, generator=g), good]), "multiclass").transpose(0, 1)
    prior = [0.5, 0.5]
    shares = fit_shares(terms, labels, prior)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert shares[1] > 0.8
    # Two images do not move the weights far, none at all does not move them.
    assert abs(float(fit_shares(terms[:2], labels[:2], prior)[1]) - 0.5) < 0.2
    assert torch.equal(fit_shares(terms[:0], labels[:0], prior), torch.tensor(prior))
    # Experts that are equally good keep the weights of the prior.
    same = torch.stack([good, good], dim=1)
    assert fit_shares(same, labels, [0.3, 0.7]).tolist() == pytest.approx([0.3, 0.7])
    # Of all weights of the grid none has a lower cost.
    costs = [
        60 * float(plain_loss((terms * torch.tensor([1 - w, w])[:, None]).sum(1), labels))
        - CONCENTRATION * (0.5 * math.log(1 - w) + 0.5 * math.log(w))
        for w in (0.05 * step for step in range(1, 20))
    ]
    assert float(shares[1]) == pytest.approx(0.05 * (1 + costs.index(min(costs))))


def test_what_the_networks_added_is_reported(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="fpt-x", train={"epochs": 2, "members": 1, "probe_weight": 0.5})
    result = train_study(study, study.extract())
    weights = [value for name, value in result.chosen.items() if name.startswith("weight of")]
    assert len(weights) == 2
    assert sum(weights) == pytest.approx(1.0, abs=2e-3)
    # Calibrated on other images than those that it is computed on, which `val_loss` is not.
    assert result.chosen["loss of the ensemble"] == pytest.approx(result.best.val_loss, abs=0.05)
    assert result.chosen["loss of the ensemble"] > result.best.val_loss
    network = load_bundle(tmp_path / "model").network
    assert isinstance(network, Ensemble)
    assert result.conclusion == network.conclusion()
    bundle = read_spec(tmp_path / "model").network
    assert ("Gain of the side networks", result.conclusion) in gradient_method("fpt-x").describe(bundle)
    assert network.shares.tolist() == pytest.approx(weights, abs=1e-3)
    kept = make_study(tmp_path / "kept", method="fpt-x-kept", train={"epochs": 1, "members": 1})
    train_study(kept, kept.extract())
    network = load_bundle(tmp_path / "kept/model").network
    assert isinstance(network, Ensemble)
    assert network.shares.tolist() == pytest.approx([0.4, 0.1, 0.5])


def test_training_steps_do_not_read_what_only_the_probes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, method="fpt-x", train={"epochs": 1, "members": 1})
    read: list[set[str]] = []
    layouts: list[set[str]] = []
    plain = FeatureDataset.__init__

    def noted(self: FeatureDataset, source: Any, ids: Any, labels: Any, reading: Reading, *rest: Any) -> None:
        plain(self, source, ids, labels, reading, *rest)
        read.append(set(self._names))
        layouts.append(set(source.layouts))

    monkeypatch.setattr(FeatureDataset, "__init__", noted)
    train_study(study, study.extract())
    # The last one is read once after training, from the store, for the statistics of source images.
    assert len(read) == 3
    for names, held in zip(read[:2], layouts[:2], strict=True):
        assert {"keys", "values", "side"} <= names
        assert not {"statistics", "pooled"} & names
        assert not {"statistics", "pooled"} & held, "held in memory for nothing"


def test_with_fitted_weights_only_networks_have_a_temperature() -> None:
    torch.manual_seed(0)
    shape = {"classes": 3, "layers": 1, "lpm_width": 16, "heads": 2, "width": 4, "image_size": 32, "prompts": 2}
    sources = (ProbeSource(name="pooled outputs", spans=((0, 32),)),)
    options = {"method": "fpt-x", "dropout": 0.0, "probe_weight": 0.5, "fits_shares": True, "sources": sources}
    network = Ensemble(SideNetworkSpec.model_validate({**shape, **options}))
    labels = torch.arange(300) % 3
    honest = torch.randn(300, 3) + 1.5 * torch.nn.functional.one_hot(labels, 3)
    network.calibrate(torch.stack([15.0 * honest, 1.0 * honest], dim=1).log_softmax(-1), labels)
    network_temperature, probe_temperature = network.sharpness.tolist()
    assert network_temperature == pytest.approx(0.1, rel=0.4)
    assert probe_temperature == 1.0
