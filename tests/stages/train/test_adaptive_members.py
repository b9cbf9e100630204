"""How many side networks FPT-X trains: one, or all if the first one lowers the held-out loss, or may lower it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from study import Study, blind_fit, make_study

from schemas.errors import StorageError
from schemas.results import EpochLog, TrainResult
from schemas.specs import HeldOut
from stages.train import gradient
from stages.train.bundle_spec import read_spec
from stages.train.job import Watch
from stages.train.trainer import train_together

EPOCHS = 3
STATED: dict[str, Any] = {"adaptive_members": False}


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "fit_statistics", blind_fit)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("adaptive")
    return make_study(folder, 12, method="fpt-x", train={"epochs": EPOCHS, "lr": 3e-3, "order_seed": 0})


@pytest.fixture(scope="module")
def calm(study: Study) -> TrainResult:
    """An uninterrupted training of three networks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradient, "fit_statistics", blind_fit)
        return run(study, "calm")[0]


@dataclass
class Calls:
    """What a training reports, and the epoch after which it is killed."""

    killed_after: int = 0
    epochs: list[tuple[int, int]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def on_epoch(self, position: int, log: EpochLog) -> None:
        self.epochs.append((position, log.epoch))
        if len(self.epochs) == self.killed_after:
            raise KilledError


class KilledError(BaseException):
    """Simulates a kill signal from inside."""


def run(
    study: Study, name: str, variants: Sequence[dict[str, Any]] = ({},), calls: Calls | None = None
) -> list[TrainResult]:
    calls = calls or Calls()
    return train_together(
        [study.changed(train=keys) for keys in variants],
        study.files(study.extract()),
        [study.root / name / str(number) for number in range(len(variants))],
        study.root / "checkpoints",
        Watch(on_epoch=calls.on_epoch, on_notice=calls.notices.append),
    )


def weights(study: Study, name: str, number: int = 0) -> dict[str, torch.Tensor]:
    return load((study.root / name / str(number) / "model.safetensors").read_bytes())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The bias of keys shifts all scores of a query alike: its gradient is rounding, which AdamW makes large.
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def left(study: Study) -> list[Path]:
    return list((study.root / "checkpoints").iterdir())


def test_one_network_is_trained_where_the_linear_probes_suffice(study: Study) -> None:
    calls = Calls()
    (adaptive, one) = run(study, "visible", [{}, {**STATED, "members": 1}], calls)
    assert calls.epochs == [(position, epoch) for epoch in (1, 2, 3) for position in (0, 1)]
    assert calls.notices == []
    # The same model as of a stated number of one.
    assert_same(weights(study, "visible", 0), weights(study, "visible", 1))
    spec = read_spec(study.root / "visible/0").network
    assert (spec.members, spec.most_members) == (1, 3)
    assert not spec.held_out.helps
    assert adaptive.conclusion.startswith("1 side network of at most 3: held-out log-loss ")
    assert adaptive.conclusion.endswith("`--method statistics` gives the same without training.")
    assert one.conclusion == adaptive.conclusion.replace(" of at most 3", "")
    assert not left(study)


def test_all_are_trained_where_the_first_one_helps(study: Study, blind: None) -> None:
    """They are those of a stated number, which trains them in one go; other runs of the pass are not repeated."""
    calls = Calls()
    adaptive, stated, two = run(study, "blind", [{}, STATED, {**STATED, "members": 2, "seed": 3}], calls)
    assert calls.epochs == [(at, epoch) for epoch in (1, 2, 3) for at in (0, 1, 2)] + [(0, 1), (0, 2), (0, 3)]
    (notice,) = calls.notices
    assert notice.startswith("Run 1: 1 side network of at most 3: ")
    assert notice.endswith("Next: 2 more side networks.")
    assert_same(weights(study, "blind", 0), weights(study, "blind", 1))
    assert adaptive.best.epoch == stated.best.epoch
    for mine, other in zip(adaptive.epochs, stated.epochs, strict=True):
        assert (mine.epoch, mine.lr, mine.val_auc) == (other.epoch, other.lr, other.val_auc)
        assert mine.train_loss == pytest.approx(other.train_loss, abs=1e-4)
        assert mine.val_loss == pytest.approx(other.val_loss, abs=1e-4)
    specs = [read_spec(study.root / f"blind/{number}").network for number in range(3)]
    assert [(spec.members, spec.most_members) for spec in specs] == [(3, 3), (3, 0), (2, 0)]
    assert specs[0].held_out.helps
    assert "because the first one helped" in adaptive.conclusion
    assert "--method statistics" not in adaptive.conclusion
    assert two.conclusion.startswith("2 side networks: ")
    assert not left(study)


def test_all_are_trained_where_the_validation_images_are_too_few_to_tell(study: Study, blind: None) -> None:
    calls = Calls()
    (result,) = run(study, "undecided", [{"lr": 1e-9, "probe_weight": 0.5}], calls)
    assert "Too few validation images to tell whether networks help" in calls.notices[0]
    assert result.conclusion.startswith("3 side networks of at most 3, because the first one helped or may help: ")
    assert read_spec(study.root / "undecided/0").network.members == 3


@pytest.mark.parametrize(
    ("gain", "error", "helps", "undecided"),
    [
        (0.03, 0.01, True, False),
        (0.005, 0.01, False, False),
        (-0.05, 0.03, False, False),
        (0.02, 0.03, False, True),
        (-0.02, 0.03, False, True),
        (0.05, 0.03, True, False),
        (0.05, None, False, True),
    ],
)
def test_a_gain_within_a_large_standard_error_decides_nothing(
    gain: float, error: float | None, helps: bool, undecided: bool
) -> None:
    found = HeldOut(linear_probes=0.5, ensemble=0.5 - gain, standard_error=error)
    assert (found.helps, found.undecided) == (helps, undecided)


def test_those_that_need_more_networks_are_trained_together(study: Study, blind: None) -> None:
    calls = Calls()
    # An ensemble weight of 0.05 changes so little that even few images see that it is nothing.
    run(study, "several", [{}, {"seed": 3}, {"lr": 1e-9, "probe_weight": 0.95}], calls)
    second = calls.epochs[3 * EPOCHS :]
    assert second == [(position, epoch) for epoch in (1, 2, 3) for position in (0, 1)]
    run(study, "single", [{"seed": 3}])
    assert_same(weights(study, "several", 1), weights(study, "single"))
    assert read_spec(study.root / "several/2").network.members == 1


@pytest.mark.parametrize("killed_after", [1, EPOCHS, EPOCHS + 1, 2 * EPOCHS])
def test_a_killed_run_is_resumed_in_either_training(
    study: Study, calm: TrainResult, blind: None, killed_after: int
) -> None:
    """In the first one, between the two, in the second one, and before the bundle is written."""
    with pytest.raises(KilledError):
        run(study, "killed", calls=Calls(killed_after))
    calls = Calls()
    (again,) = run(study, "killed", calls=calls)
    assert again.resumed_from == max(0, killed_after - EPOCHS)
    assert [log.val_loss for log in again.epochs] == [log.val_loss for log in calm.epochs]
    assert (study.root / "killed/0/model.safetensors").read_bytes() == (
        study.root / "calm/0/model.safetensors"
    ).read_bytes()
    assert calls.epochs == [(0, epoch) for epoch in (1, 2, 3)] * 2, "finished epochs are reported again"
    assert not left(study)


def test_damaged_weights_of_an_epoch_are_named(study: Study, blind: None) -> None:
    with pytest.raises(KilledError):
        run(study, "damaged", calls=Calls(EPOCHS))
    (path,) = (study.root / "checkpoints").glob("*-2.weights")
    whole = path.read_bytes()
    for data, problem in ((whole[:-1], "is damaged"), (None, "is missing")):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(StorageError, match=f"2.weights {problem}"):
            run(study, "damaged")
    path.write_bytes(whole)
    run(study, "damaged")
    assert read_spec(study.root / "damaged/0").network.members == 3
