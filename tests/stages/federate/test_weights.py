"""The mean over sites: exact for a frozen factor, and of everything that travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from study import make_study

from schemas.errors import TrainingError
from stages.federate.weights import constants_digest, spoiled, state_of, travelling, weighted_mean
from stages.lpm.loading import load_lpm
from stages.methods.base import gradient_method


def network_of(tmp_path: Path, method: str, seed: int = 0, **options: Any) -> Any:
    section = method.replace("-", "_")
    study = make_study(tmp_path, method=method, methods={section: options}, features={"hidden": 3})
    torch.manual_seed(seed)
    network = gradient_method(method).build(gradient_method(method).spec(study.settings, study.lpm, 3))
    network.start_from(load_lpm(study.settings.lpm, study.lpm.image_size, tmp_path).model)
    return network


def moved(network: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = state_of(network, travelling(network))
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def updates(state: dict[str, torch.Tensor], method: str) -> list[torch.Tensor]:
    """The low-rank matrices in a complete state."""
    if method == "decomposed-prompts":
        return [state["adaptation.left"].double() @ state["adaptation.right"].double()]
    pairs = [(name, name.replace("lora_B", "lora_A")) for name in state if "lora_B" in name]
    return [state[b].double() @ state[a].double() for b, a in pairs]


@pytest.mark.parametrize(("method", "option"), [("lora", "freeze_a"), ("decomposed-prompts", "freeze_u")])
def test_the_mean_of_updates_is_the_update_of_the_mean_with_a_frozen_factor(
    tmp_path: Path, method: str, option: str
) -> None:
    errors = {}
    for frozen in (True, False):
        network = network_of(tmp_path / str(frozen), method, rank=2, **{option: frozen})
        complete = {name: value.clone() for name, value in network.state_dict().items()}
        sites, counts = [moved(network, seed) for seed in range(3)], [1, 2, 5]
        assert ("lora_A" in str(sites[0].keys()) or "adaptation.left" in sites[0]) is not frozen
        averaged = updates({**complete, **weighted_mean(sites, counts)}, method)
        each = [updates({**complete, **site}, method) for site in sites]
        expected = [sum(n / 8 * one for n, one in zip(counts, parts, strict=True)) for parts in zip(*each, strict=True)]
        errors[frozen] = max(float((a - b).abs().max()) for a, b in zip(averaged, expected, strict=True))
    assert errors[True] < 1e-7 < 1e-4 < errors[False]


def test_a_frozen_factor_is_saved_does_not_travel_and_comes_from_the_seed(tmp_path: Path) -> None:
    network = network_of(tmp_path / "a", "lora", rank=2, freeze_a=True)
    saved = set(network.state_dict())
    assert saved - set(travelling(network)) == {name for name in saved if "lora_A" in name} != set()
    same = network_of(tmp_path / "b", "lora", rank=2, freeze_a=True)
    other = network_of(tmp_path / "c", "lora", seed=1, rank=2, freeze_a=True)
    assert constants_digest(network) == constants_digest(same) != constants_digest(other)


def test_the_mean_is_weighted_by_examples_and_exact_for_equal_states() -> None:
    one, two = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([4.0, 8.0])}
    torch.testing.assert_close(weighted_mean([one, two], [2, 1])["w"], torch.tensor([2.0, 4.0]), rtol=0, atol=0)
    state = {"w": torch.rand(1000) / 3, "n": torch.tensor(3)}
    for counts in ([7], [1, 3, 9], [331, 1, 5, 77]):
        mean = weighted_mean([state] * len(counts), counts)
        assert torch.equal(mean["w"], state["w"]) and torch.equal(mean["n"], state["n"])
    with pytest.raises(TrainingError, match="whole numbers"):
        weighted_mean([state, {**state, "n": torch.tensor(4)}], [1, 1])
    with pytest.raises(TrainingError, match="training images"):
        weighted_mean([state], [0])


def test_states_that_do_not_fit_are_found() -> None:
    start = {"w": torch.zeros(2), "unknown": torch.tensor([torch.nan])}
    assert spoiled({"w": torch.ones(2), "unknown": torch.tensor([torch.nan])}, start) is None
    assert spoiled({"w": torch.ones(2)}, start) == "unknown"
    for bad in (torch.ones(3), torch.ones(2).double(), torch.tensor([1.0, torch.inf])):
        assert spoiled({**start, "w": bad}, start) == "w"
