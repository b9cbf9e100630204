"""Runs that share one stream of batches end where each would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load
from study import Study, make_study

from schemas.errors import SettingsError
from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog, TrainResult
from stages.methods.fpt import PromptedSideNetwork
from stages.train.job import Watch
from stages.train.trainer import train, train_together

VARIANTS: list[dict[str, Any]] = [
    {"lr": 2e-3},
    {"lr": 5e-4, "weight_decay": 0.0},
    {"lr": 2e-3, "seed": 3, "dropout": 0.2, "class_weights": "balanced"},
    {"lr": 1e-3, "seed": 4, "clip_norm": 0.1, "members": 2, "probe_weight": 0.3, "keep": "last"},
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("together"), train={"epochs": 3, "order_seed": 7})


def variants(study: Study) -> list[ResolvedSettings]:
    return [study.changed(train=keys) for keys in VARIANTS]


def together(study: Study, folder: str, watch: Watch | None = None) -> list[TrainResult]:
    outputs = [study.root / folder / str(number) for number in range(len(VARIANTS))]
    return train_together(variants(study), study.files(study.extract()), outputs, study.root / "checkpoints", watch)


def weights(study: Study, folder: str) -> dict[str, torch.Tensor]:
    return load((study.root / folder / "model.safetensors").read_bytes())


def test_each_run_ends_where_it_would_alone(study: Study) -> None:
    results = together(study, "t")
    for number, settings in enumerate(variants(study)):
        folder = study.root / f"alone/{number}"
        alone = train(settings, study.files(study.extract()), folder, study.root / "checkpoints")
        assert alone.best.epoch == results[number].best.epoch
        for mine, other in zip(alone.epochs, results[number].epochs, strict=True):
            assert mine.val_loss == pytest.approx(other.val_loss, abs=1e-4)
            assert mine.train_loss == pytest.approx(other.train_loss, abs=1e-4)
        expected, found = weights(study, f"alone/{number}"), weights(study, f"t/{number}")
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert not list((study.root / "checkpoints").iterdir())


def test_the_variants_are_really_different(study: Study) -> None:
    together(study, "d")
    heads = [weights(study, f"d/{number}") for number in range(3)]
    assert not torch.equal(heads[0]["side.head.weight"], heads[1]["side.head.weight"])
    assert not torch.equal(heads[0]["side.pos_embed"], heads[2]["side.pos_embed"])


def test_dropout_follows_from_the_seed_of_each_run_and_the_epoch(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []
    reseed = PromptedSideNetwork.reseed

    def noted(network: PromptedSideNetwork, *entropy: int) -> None:
        drawn.append(entropy)
        reseed(network, *entropy)

    monkeypatch.setattr(PromptedSideNetwork, "reseed", noted)
    together(study, "seeds")
    expected = [entropy for epoch in (1, 2, 3) for entropy in ((0, epoch), (0, epoch), (3, epoch))]
    assert [entropy for entropy in drawn if len(entropy) == 2] == expected
    assert sorted(entropy for entropy in drawn if len(entropy) == 3) == [(4, e, m) for e in (1, 2, 3) for m in (0, 1)]


@pytest.mark.parametrize("position", [1, 3])
def test_a_kill_between_two_checkpoints_is_made_good(study: Study, position: int) -> None:
    class Killed(BaseException):
        pass

    def die(at: int, log: EpochLog) -> None:
        if (at, log.epoch) == (position, 2):
            raise Killed

    calm = together(study, "calm")
    with pytest.raises(Killed):
        together(study, "killed", watch=Watch(on_epoch=die))
    again = together(study, "killed")
    # Those up to the killed one had their second checkpoint.
    assert [result.resumed_from for result in again] == [2 if at <= position else 1 for at in range(len(VARIANTS))]
    for number, (mine, other) in enumerate(zip(calm, again, strict=True)):
        for left, right in zip(mine.epochs, other.epochs, strict=True):
            assert left.val_loss == pytest.approx(right.val_loss, abs=1e-4)
        expected, found = weights(study, f"calm/{number}"), weights(study, f"killed/{number}")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"epochs": 5}, {"prompts": 3}, {"order_seed": 1}])
def test_what_must_be_shared_is_named(study: Study, change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(SettingsError, match=rf"train\.{name}"):
        train_together(
            [study.settings, study.changed(train=change)],
            study.files(study.extract()),
            [study.root / "x", study.root / "y"],
            study.root / "checkpoints",
        )
