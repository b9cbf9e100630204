"""Phases of a training: optimiser state, schedule, what is kept, and resuming, with PT-PEFT as the example."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from study import Study, make_study

from schemas.results import EpochLog, TrainResult
from stages.methods.base import gradient_method
from stages.phases import Phase
from stages.ranks import Ranks
from stages.train import micro_batches
from stages.train.checkpoints import Fit
from stages.train.job import Watch
from stages.train.loop import Run, keep_epoch
from stages.train.trainer import train, train_together

EPOCHS, LR = 4, 1e-2


class Killed(BaseException):
    """A kill signal, from inside."""


def study_at(root: Path, method: str = "pt-peft", **train: Any) -> Study:
    return make_study(
        root,
        method=method,
        methods={"pt_peft": {"prompts": 3, "rank": 2}},
        train={"epochs": EPOCHS, "lr": LR, "weight_decay": 0.1, "start_block": 4, **train},
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_at(tmp_path_factory.mktemp("phases"), order_seed=7)


def trained(study: Study, output: str, watch: Watch | None = None) -> TrainResult:
    files = study.files(None)
    return train(study.settings, files, study.root / output, study.root / "checkpoints", watch)


def killed_after(epoch: int) -> Watch:
    def die(_: int, log: EpochLog) -> None:
        if log.epoch == epoch:
            raise Killed

    return Watch(on_epoch=die)


def checkpoint(study: Study, epoch: int) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint after an epoch; it is removed."""
    with pytest.raises(Killed):
        trained(study, "stopped", killed_after(epoch))
    (path,) = (study.root / "checkpoints").iterdir()
    content = path.read_bytes()
    path.unlink()
    return load(content.split(b"\n", 2)[2])


def test_progress_runs_from_zero_to_one_in_each_phase() -> None:
    phase = Phase(3, 4)
    assert [phase.progress(epoch, step, 2) for epoch in (3, 4) for step in (0, 1)] == [0.0, 0.25, 0.5, 0.75]


def test_each_phase_has_its_own_schedule_and_optimiser_state(study: Study) -> None:
    result = trained(study, "model")
    steps = math.ceil(len(list(study.manifest.of("train"))) / 8)
    last = [0.5 * (1 + math.cos(math.pi * (epoch * steps + steps - 1) / (2 * steps))) for epoch in (0, 1)]
    expected = [LR * share for share in last] + [0.5 * LR * share for share in last]
    assert [log.lr for log in result.epochs] == pytest.approx(expected)
    for epoch, count in ((1, steps), (2, 2 * steps), (3, steps)):
        tensors = checkpoint(study, epoch)
        counts = {float(value) for name, value in tensors.items() if name.endswith(".step")}
        assert counts == {count}, "a new phase counts its own steps"


def test_what_a_phase_does_not_train_does_not_move(study: Study) -> None:
    states = [checkpoint(study, epoch) for epoch in (1, 2, 3)]
    for name, value in states[0].items():
        if not name.startswith("network."):
            continue
        low_rank = ".updates." in name
        assert torch.equal(value, states[1][name]) == low_rank, name
        assert not torch.equal(value, states[2][name]), name
        if name.endswith(".up"):
            assert not value.any()


def test_what_a_phase_does_not_train_gets_no_gradient_of_several_processes(study: Study) -> None:
    method = gradient_method("pt-peft")
    network: Any = method.build(method.spec(study.settings, study.lpm, 3))
    network.begin_epoch(1, EPOCHS)
    found = micro_batches._gradients([network], Ranks(0, 2))
    assert len(found) == 4  # keys, values, and the head
    assert all(value.grad is None for value in network.adaptation.updates.parameters())
    network.begin_epoch(EPOCHS, EPOCHS)
    assert len(micro_batches._gradients([network], Ranks(0, 2))) == 4 + 2 * len(network.adaptation.updates)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_killed_run_ends_where_an_undisturbed_one_ends(study: Study, after: int) -> None:
    trained(study, "calm")
    with pytest.raises(Killed):
        trained(study, "killed", killed_after(after))
    assert trained(study, "killed").resumed_from == after
    for name in ("model.safetensors", "model.json"):
        assert (study.root / "calm" / name).read_bytes() == (study.root / "killed" / name).read_bytes()


def test_runs_that_share_batches_end_where_each_would_alone(study: Study) -> None:
    changes: list[dict[str, Any]] = [{}, {"lr": 2e-3, "seed": 3}]
    variants = [study.changed(train=keys) for keys in changes]
    files, outputs = study.files(None), [study.root / f"t/{number}" for number in range(2)]
    # The second run has no checkpoint of the first epoch of the second phase.
    position = iter(range(100))

    def die(_: int, __: EpochLog) -> None:
        if next(position) == 4:
            raise Killed

    with pytest.raises(Killed):
        train_together(variants, files, outputs, study.root / "checkpoints", Watch(on_epoch=die))
    together = train_together(variants, files, outputs, study.root / "checkpoints")
    assert [result.resumed_from for result in together] == [3, 2]
    for number, settings in enumerate(variants):
        alone = train(settings, files, study.root / f"alone/{number}", study.root / "checkpoints")
        for mine, other in zip(alone.epochs, together[number].epochs, strict=True):
            assert mine.val_loss == pytest.approx(other.val_loss, abs=1e-4)
        states = [load_file(study.root / f"{folder}/{number}/model.safetensors") for folder in ("t", "alone")]
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("keep", "expected"), [("best", [1, 1, 3, 3, 3, 3]), ("late", [1, 1, 3, 3, 5, 5])])
def test_an_epoch_of_the_last_phase_is_kept(study: Study, keep: str, expected: list[int]) -> None:
    settings = study.changed(train={"keep": keep, "epochs": 6}).train
    network = torch.nn.Linear(1, 1)
    network.phase = lambda epoch, _: Phase(1, 2) if epoch < 3 else Phase(3, 6)  # type: ignore[assignment]
    recipe: Any = type("Recipe", (), {"settings": settings})
    run = Run(Fit(network, torch.optim.AdamW(network.parameters())), recipe, Path(), lambda _: None)  # type: ignore[arg-type]
    kept = []
    for epoch, auc in enumerate((0.9, 0.8, 0.7, 0.6, 0.65, 0.5), start=1):
        keep_epoch(
            run,
            EpochLog(epoch=epoch, train_loss=1, val_loss=1, val_auc=auc, val_accuracy=0.5, lr=None, seconds=0),
        )
        kept.append(run.state.best)
    assert kept == expected


def test_the_bundle_is_of_the_last_phase(tmp_path: Path) -> None:
    study = study_at(tmp_path, lr=1.0)  # so high that later epochs are worse
    result = trained(study, "model")
    assert result.best.epoch == max(result.epochs[2:], key=lambda log: (log.val_auc or 0, -log.val_loss)).epoch
    assert any(value.any() for name, value in load_file(tmp_path / "model/model.safetensors").items() if ".up" in name)
