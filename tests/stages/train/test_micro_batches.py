"""Cheaper steps give the same model: checkpointing, batches in parts, bfloat16 and compiled blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from study import Study, make_study
from training_runs import ALL, WEIGHTS, a_run, batch, steps

from schemas.results import TrainResult
from schemas.settings import TrainSettings
from stages.methods.base import Network
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fusion import context
from stages.methods.side_network import Block
from stages.ranks import Ranks
from stages.train.compiling import compile_blocks
from stages.train.loop import Run, training_step
from stages.train.micro_batches import split_batch
from stages.train.trainer import train


def gradients(network: Network) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same_step(one: Run, other: Run, tolerance: float = 0.0, **keywords: Any) -> None:
    """Losses of some steps and the clipped gradients of the last of them."""
    assert steps(one, **keywords) == pytest.approx(steps(other, **keywords), abs=tolerance)
    expected, found = gradients(one.network), gradients(other.network)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ALL)
def test_checkpointing_changes_no_bit(method: str) -> None:
    assert_same_step(a_run(method), a_run(method, checkpointing=True))


def test_checkpointing_computes_blocks_a_second_time() -> None:
    calls: list[str] = []
    for name, kept in (("all", False), ("inputs", True)):
        run = a_run("fpt+", checkpointing=kept)
        for module in run.network.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        steps(run, (8,))
    assert (calls.count("all"), calls.count("inputs")) == (3, 6)


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("method", ALL)
def test_parts_add_up_to_the_batch(method: str, weights: torch.Tensor | None, accumulate: int) -> None:
    assert_same_step(a_run(method, weights), a_run(method, weights, accumulate=accumulate), 2e-6)


def test_a_class_of_no_weight_may_fill_a_part() -> None:
    weights = torch.tensor([0.0, 1.0, 5.0])
    assert_same_step(a_run("fpt+", weights), a_run("fpt+", weights, accumulate=8), 2e-6)


def test_parts_may_be_checkpointed_too() -> None:
    assert_same_step(a_run("fpt-x"), a_run("fpt-x", accumulate=4, checkpointing=True), 2e-6)


def test_runs_side_by_side_come_in_parts_each_with_its_own_weights() -> None:
    alone = [a_run("fpt+"), a_run("fpt+", WEIGHTS)]
    together = [a_run("fpt+", accumulate=4), a_run("fpt+", WEIGHTS, accumulate=4)]
    losses = training_step(together, batch())
    for run, mine, loss in zip(alone, together, losses, strict=True):
        assert float(loss) == pytest.approx(steps(run, (8,))[0], abs=2e-6)
        for name, value in gradients(run.network).items():
            torch.testing.assert_close(gradients(mine.network)[name], value, rtol=2e-6, atol=2e-6)


def test_accumulate_divides_the_batch() -> None:
    with pytest.raises(ValidationError, match=r"accumulate \(3\) must divide batch_size \(16\)"):
        TrainSettings(accumulate=3)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_rows", [1, 2, 7, 16])
def test_micro_batches_of_all_processes_cover_a_batch_once(batch_rows: int, count: int, accumulate: int) -> None:
    covered: list[int] = []
    for rank in range(count):
        ranks = Ranks(rank, count)
        own = ranks.rows(batch_rows)
        parts = split_batch(own.stop - own.start, batch_rows, 16, accumulate, ranks)
        assert len(parts) <= accumulate
        for part in parts:
            place = part.place or slice(0, batch_rows)
            assert place.stop - place.start == part.rows.stop - part.rows.start
            covered += range(place.start, place.stop)
    assert covered == list(range(batch_rows))


def trained(study: Study, name: str, **keys: Any) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    files = study.files(study.extract())
    result = train(study.changed(train=keys), files, study.root / name, study.root / "checkpoints")
    return result, load((study.root / name / "model.safetensors").read_bytes())


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_training_in_parts_with_checkpointing_ends_where_training_ends(tmp_path: Path, dtype: str) -> None:
    study = make_study(tmp_path, features={"dtype": dtype}, train={"class_weights": "balanced"})
    plain, weights = trained(study, "plain")
    again, same = trained(study, "again", checkpointing=True)
    assert [log.val_loss for log in plain.epochs] == [log.val_loss for log in again.epochs]
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    parts, _ = trained(study, "parts", accumulate=4)
    for mine, other in zip(plain.epochs, parts.epochs, strict=True):
        assert other.train_loss == pytest.approx(mine.train_loss, abs=1e-5)
        assert other.val_loss == pytest.approx(mine.val_loss, abs=1e-5)


def test_bfloat16_is_for_the_products_of_a_training_step_alone(study: Study) -> None:
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    forward = torch.nn.Linear.forward

    def noted(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        result = forward(module, x)
        seen[module.training].add(result.dtype)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", noted)
        result, weights = trained(study, "half", precision="bfloat16")
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    plain, _ = trained(study, "plain")
    for mine, other in zip(plain.epochs, result.epochs, strict=True):
        assert other.train_loss == pytest.approx(mine.train_loss, abs=0.02)
        assert other.train_loss != mine.train_loss


@pytest.mark.parametrize("method", ["fpt", "fpt+", "fpt-x"])
def test_bfloat16_gradients_are_near_those_of_float32(method: str) -> None:
    plain, half = a_run(method), a_run(method, precision="bfloat16")
    assert steps(half, (8,)) == pytest.approx(steps(plain, (8,)), rel=0.02)
    expected, found = (torch.cat([g.flatten() for g in gradients(run.network).values()]) for run in (plain, half))
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_attention_to_codes_takes_part_in_bfloat16() -> None:
    g = torch.Generator().manual_seed(0)
    codes = [torch.randint(-127, 128, (5, 2, 7, 16), generator=g).to(torch.int8) for _ in range(2)]
    scale = torch.randint(100, 110, (5, 2, 2, 7), generator=g).to(torch.uint8)
    cached = CachedTokens(*codes, scale, torch.zeros(5, 2, 2, 16, dtype=torch.float16))
    query = 0.01 * torch.randn(4, 32, generator=g)
    expected = context(query, cached)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = context(query, cached)
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < float((found.float() - expected).norm() / expected.norm()) < 0.008


@pytest.mark.slow
def test_compiled_blocks_give_the_same_steps_and_the_last_smaller_batch_runs_as_it_stands() -> None:
    plain, compiled = a_run("fpt-x"), a_run("fpt-x", compile=True, checkpointing=True)
    names = list(compiled.network.state_dict())
    compile_blocks([compiled.network], torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    assert_same_step(plain, compiled, 1e-5)
    assert list(compiled.network.state_dict()) == names
    # Two members of three blocks: one shape of block within, one last; nothing for the batch of five.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("train", "tolerance"),
    [({"checkpointing": True}, 1e-5), ({"accumulate": 4}, 1e-5), ({"compile": True}, 1e-4)],
    ids=["checkpointing", "accumulate", "compile"],
)
def test_a_gpu_gives_the_same_steps(train: dict[str, Any], tolerance: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    plain, cheaper = a_run("fpt-x", device="cuda"), a_run("fpt-x", device="cuda", **train)
    if "compile" in train:
        compile_blocks([cheaper.network], torch.device("cuda"))
    assert_same_step(plain, cheaper, tolerance)
