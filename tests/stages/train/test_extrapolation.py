"""Extrapolation for large batches: workers at points of their own, as `train.optimizer` extrap-sgd and extrap-adamw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from study import Study, make_study, train_study
from torch import nn
from training_runs import WEIGHTS, a_run, batch, steps

from schemas.errors import SettingsError
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.results import EpochLog
from schemas.settings import TrainSettings
from stages.losses import loss_weight
from stages.lpm.loading import describe_lpm
from stages.ranks import ALONE, Ranks
from stages.train.checks import check_workers
from stages.train.cost import estimate_cost
from stages.train.extrapolation import ExtrapolatedStep
from stages.train.inputs import inputs_key
from stages.train.job import Watch, run_key
from stages.train.loop import Run, make_optimizer
from stages.train.micro_batches import split_workers

FULL = (8, 8, 8)
"""Batches that four workers share equally."""


def weights(run: Run) -> list[torch.Tensor]:
    return [value.clone() for value in run.network.parameters()]


def assert_same(one: Run, other: Run) -> None:
    for mine, its in zip(weights(one), weights(other), strict=True):
        assert torch.equal(mine, its)


def settings(optimizer: str = "extrap-sgd", **keys: Any) -> TrainSettings:
    return TrainSettings(optimizer=optimizer, **{"batch_size": 8, "weight_decay": 0.0, "momentum": 0.0, **keys})


@pytest.mark.parametrize(
    ("inner", "workers", "class_weights"),
    [("sgd", 1, None), ("adamw", 1, WEIGHTS), ("sgd", 4, WEIGHTS), ("adamw", 4, None)],
)
def test_at_rate_zero_it_is_the_inner_optimiser_to_the_bit(
    inner: str, workers: int, class_weights: torch.Tensor | None
) -> None:
    plain = a_run("fpt-x", class_weights, optimizer=inner, accumulate=workers)
    extrapolation = {"workers": workers, "rate": 0.0}
    other = a_run("fpt-x", class_weights, optimizer=f"extrap-{inner}", extrapolation=extrapolation)
    assert steps(plain, FULL) == steps(other, FULL)
    assert_same(plain, other)


@pytest.mark.parametrize("optimizer", ["extrap-sgd", "extrap-adamw"])
def test_the_first_step_extrapolates_nothing_and_the_second_does(optimizer: str) -> None:
    plain = a_run("fpt+", optimizer=optimizer.removeprefix("extrap-"), accumulate=2, lr=0.1)
    other = a_run("fpt+", optimizer=optimizer, extrapolation={"workers": 2, "rate": 1.0}, lr=0.1)
    assert steps(plain, (8,)) == steps(other, (8,))
    assert_same(plain, other)
    assert steps(plain, (8,)) != steps(other, (8,))


@pytest.mark.parametrize("clip_norm", [1e9, 0.01])
def test_on_a_quadratic_the_iterates_are_those_of_the_recursion(clip_norm: float) -> None:
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.double)
    hessian, eta, eta_hat = root @ root.T / 5, 0.1, 0.03
    weight = nn.Parameter(torch.randn(5, dtype=torch.double))
    train = settings(lr=eta, extrapolation={"workers": 1, "rate": eta_hat / eta})
    optimizer = make_optimizer(nn.ParameterList([weight]), train)
    expected, past = weight.detach().clone(), torch.zeros(5, dtype=torch.double)
    for _ in range(12):
        step = ExtrapolatedStep(optimizer, train)
        optimizer.zero_grad()
        with step.at(0, None):
            (0.5 * weight @ hessian @ weight).backward()  # type: ignore[no-untyped-call]
        step.join()
        nn.utils.clip_grad_norm_(weight, clip_norm)
        optimizer.step()
        step.remember()
        # g_t = H (w_t - eta_hat g_(t-1)); only the step is clipped.
        past = hessian @ (expected - eta_hat * past)
        expected = expected - eta * past * min(1.0, clip_norm / (float(past.norm()) + 1e-6))
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


def test_each_worker_extrapolates_its_own_gradient_and_the_step_takes_their_mean() -> None:
    curvatures, eta, eta_hat = (1.0, 3.0), 0.1, 0.05
    weight = nn.Parameter(torch.ones(1, dtype=torch.double))
    train = settings(lr=eta, extrapolation={"workers": 2})
    assert train.extrapolation.relative_rate * eta == eta_hat
    optimizer = make_optimizer(nn.ParameterList([weight]), train)
    expected, past = 1.0, [0.0, 0.0]
    for _ in range(6):
        optimizer.zero_grad()
        step = ExtrapolatedStep(optimizer, train)
        for worker, curvature in enumerate(curvatures):
            with step.at(worker, torch.tensor(4.0)):  # Four rows each, whose losses are summed.
                (4 * 0.5 * curvature * weight**2).sum().backward()
        step.join()
        assert weight.grad is not None
        weight.grad.div_(8.0)
        optimizer.step()
        step.remember()
        past = [curvature * (expected - eta_hat * one) for curvature, one in zip(curvatures, past, strict=True)]
        expected -= eta * sum(past) / 2
        assert float(weight.detach()) == pytest.approx(expected, abs=1e-12)


def test_the_preconditioned_direction_is_divided_by_the_root_mean_square_of_adamw() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.double))
    train = settings("extrap-adamw", lr=0.1, extrapolation={"workers": 1, "direction": "preconditioned"})
    optimizer, points = make_optimizer(nn.ParameterList([weight]), train), []
    for _ in range(2):
        optimizer.zero_grad()
        step = ExtrapolatedStep(optimizer, train)
        before = weight.detach().clone()
        with step.at(0, None):
            points.append(weight.detach() - before)
            (weight * torch.tensor([1e-3, -10.0])).sum().backward()
        step.join()
        optimizer.step()
        step.remember()
    assert points[0].tolist() == [0, 0]
    # A constant gradient over its root mean square is its sign, whatever its scale.
    torch.testing.assert_close(points[1], torch.tensor([-0.1, 0.1], dtype=torch.double), rtol=1e-4, atol=0)


def test_a_clipped_gradient_does_not_make_the_preconditioned_extrapolation_longer() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.double))
    train = settings("extrap-adamw", lr=0.1, extrapolation={"workers": 1, "direction": "preconditioned"})
    optimizer = make_optimizer(nn.ParameterList([weight]), train)
    for number in range(2):
        optimizer.zero_grad()
        step = ExtrapolatedStep(optimizer, train)
        before = weight.detach().clone()
        with step.at(0, None):
            # AdamW knows the gradient only as it is after clipping, a thousandth.
            assert number == 0 or (weight.detach() - before).tolist() == pytest.approx([-0.1, 0.1])
            (weight * torch.tensor([800.0, -600.0])).sum().backward()
        step.join()
        nn.utils.clip_grad_norm_(weight, 1.0)
        optimizer.step()
        step.remember()


def test_weights_are_restored_exactly_where_the_backward_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run("fpt+", optimizer="extrap-sgd", extrapolation={"workers": 2, "rate": 10.0}, lr=0.1)
    steps(run, (8,))
    before = weights(run)

    def moved_and_failing(*_: Any) -> None:
        assert any(not torch.equal(mine, its) for mine, its in zip(weights(run), before, strict=True))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", moved_and_failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        steps(run, (8,))
    for mine, its in zip(weights(run), before, strict=True):
        assert torch.equal(mine, its)


def test_rows_without_weight_extrapolate_nothing() -> None:
    class_weights = torch.tensor([0.0, 1.0, 5.0])
    run = a_run("fpt+", class_weights, optimizer="extrap-sgd", extrapolation={"workers": 8, "rate": 1.0}, lr=0.1)
    labels = batch().labels
    weightless = int((labels == 0).nonzero()[0])
    assert float(loss_weight(labels[weightless : weightless + 1], "multiclass", class_weights)) == 0
    steps(run, (8, 8, 5, 3))
    assert all(bool(value.isfinite().all()) for value in run.network.state_dict().values())
    pasts = [value for state in run.state.optimizer.state.values() for value in state.values()]
    assert all(bool(value.isfinite().all()) for value in pasts if value is not None)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_rows", [1, 3, 7, 16])
def test_workers_have_the_same_rows_in_any_number_of_processes(batch_rows: int, processes: int) -> None:
    expected = {part.worker: part.place or slice(0, batch_rows) for part in split_workers(batch_rows, 16, 4, ALONE)}
    assert sorted(row for rows in expected.values() for row in range(batch_rows)[rows]) == list(range(batch_rows))
    found = {}
    for rank in range(processes):
        ranks = Ranks(rank, processes)
        start = ranks.rows(batch_rows).start
        for part in split_workers(batch_rows, 16, 4, ranks):
            place = part.place or slice(0, batch_rows)
            assert (part.rows.start + start, part.rows.stop + start) == (place.start, place.stop)
            found[part.worker] = place
    assert found == expected


def test_processes_share_out_the_workers_equally_or_refuse() -> None:
    lpm = describe_lpm("test_vit", 64, Path())
    raw = {"lpm": {"name": "test_vit"}, "train": {"optimizer": "extrap-sgd", "side_reduction": 4}}
    resolved = resolve(parse_settings({**raw, "features": {"image_size": 64}}), lpm)
    assert resolved.train.extrapolation.rate == 0.25
    check_workers(resolved, Ranks(0, 2))
    with pytest.raises(SettingsError, match="multiple of the 3 processes"):
        check_workers(resolved, Ranks(0, 3))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 6}, r"workers \(4\) must divide batch_size \(6\)"),
        ({"accumulate": 2}, "accumulate must be 1 with extrap-sgd"),
        ({"extrapolation": {"direction": "preconditioned"}}, "is for extrap-adamw"),
        ({"extrapolation": {"rate": -1}}, "greater than or equal to 0"),
    ],
)
def test_combinations_without_meaning_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSettings(optimizer="extrap-sgd", **keys)


class Killed(BaseException):
    """A kill signal, from inside."""


@pytest.mark.parametrize(
    ("method", "optimizer"), [("fpt+", "sgd"), ("vpt-deep", "extrap-sgd"), ("fpt-x", "extrap-adamw")]
)
def test_a_killed_run_ends_where_an_undisturbed_one_ends(tmp_path: Path, method: str, optimizer: str) -> None:
    study = a_study(tmp_path, method, optimizer)
    receipt = study.extract()
    train_study(study, receipt, "calm")

    def die(_: int, log: EpochLog) -> None:
        if log.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        train_study(study, receipt, "killed", watch=Watch(on_epoch=die))
    assert train_study(study, receipt, "killed").resumed_from == 2
    assert (tmp_path / "calm/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def a_study(root: Path, method: str, optimizer: str) -> Study:
    """A study of side networks, or of an adaptation of the last block from cached hidden tokens."""
    extrapolation = {"workers": 4, "rate": 2.0}
    train = {"epochs": 3, "optimizer": optimizer, "extrapolation": extrapolation, "lr": 3e-3}
    if method == "vpt-deep":
        return make_study(root, method=method, train=train, features={"hidden": 5})
    members = {"members": 2, "probe_weight": 0.0} if method == "fpt-x" else {}
    return make_study(root, method=method, train={**train, **members})


def test_settings_without_effect_do_not_change_the_key_of_a_run(study: Study) -> None:
    key = inputs_key(study.settings, study.files(study.extract()))

    def key_of(**train: Any) -> str:
        return run_key(study.changed(train=train), study.manifest, key)

    other = study.settings.train.extrapolation.model_copy(update={"workers": 2})
    assert key_of() == key_of(momentum=0.5) == key_of(extrapolation=other)
    assert key_of(optimizer="sgd") == key_of(optimizer="sgd", extrapolation=other)
    assert key_of(optimizer="extrap-adamw") == key_of(optimizer="extrap-adamw", momentum=0.5)
    keys = [key_of(optimizer=name) for name in ("adamw", "sgd", "extrap-sgd", "extrap-adamw")]
    assert len({*keys, key_of(optimizer="sgd", momentum=0.5), key_of(optimizer="extrap-sgd", extrapolation=other)}) == 6


def test_a_step_with_workers_holds_their_past_gradients() -> None:
    lpm, costs = describe_lpm("test_vit", 96), {}
    for optimizer in ("adamw", "sgd", "extrap-adamw"):
        train = {"optimizer": optimizer, "momentum": 0.0, "side_reduction": 4}
        raw = {"method": "fpt+", "lpm": {"name": "test_vit"}, "features": {"image_size": 96}, "train": train}
        costs[optimizer] = estimate_cost(resolve(parse_settings(raw), lpm), lpm, 3)
    learnable = costs["adamw"].learnable * 4 / 2**20
    states = {name: cost.train_states_mib for name, cost in costs.items()}
    # Parameters, gradients, two moments of AdamW, and the gradients of four workers.
    assert states == pytest.approx({"adamw": 4 * learnable, "sgd": 2 * learnable, "extrap-adamw": 8 * learnable})
    totals = {name: cost.train_tensor_mib for name, cost in costs.items()}
    assert totals["sgd"] is not None
    assert totals["adamw"] is not None
    assert totals["extrap-adamw"] is not None
    assert totals["sgd"] < totals["adamw"]
    # Activations of a part are fewer, but the gradients of this step are held as well as those of the last.
    assert totals["extrap-adamw"] > states["extrap-adamw"]
