"""E2VPT: the published joining of keys and values, initial values, and pruning inside one training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import assert_same_with_gradients, pixels, spec_of, tiny_vit, written_out
from safetensors.torch import load_file
from study import Study, make_study

from schemas.errors import TrainingError
from schemas.prompt_adaptations import E2vptSettings
from schemas.results import EpochLog, TrainResult
from stages.lpm.adaptation import install
from stages.methods.e2vpt import EffectivePrompts, PrunedPrompts
from stages.phases import Phase
from stages.train.job import Watch
from stages.train.trainer import train


@pytest.mark.parametrize("shared", [True, False])
def test_keys_and_values_are_joined_as_published(shared: bool) -> None:
    model = tiny_vit()
    options = E2vptSettings(prompts=4, kv_prompts=3, shared=shared)
    adaptation = EffectivePrompts(spec_of(model, "e2vpt"), options).double()
    mine = list(adaptation.parameters())
    other = {name: value.detach().clone().requires_grad_() for name, value in adaptation.named_parameters()}
    assert set(other) == ({"prompts", "keys"} if shared else {"prompts", "keys", "values"})
    values = list(other["keys" if shared else "values"])
    # Prompts are tokens of the block with queries of their own, as published.
    expected = written_out(model, pixels(), deep=list(other["prompts"]), keys=list(other["keys"]), values=values)
    install(model, adaptation)
    found = model(pixels())
    assert_same_with_gradients(found, expected, mine, list(other.values()))
    with torch.no_grad():
        adaptation.fold(model)
        torch.testing.assert_close(model(pixels()), found, rtol=0, atol=1e-12)


def test_initial_keys_are_the_published_ones() -> None:
    spec = spec_of(tiny_vit(), "e2vpt").model_copy(update={"width": 768, "heads": 12})
    torch.manual_seed(0)
    keys = EffectivePrompts(spec, E2vptSettings()).keys.detach()
    assert keys.shape == (2, 12, 5, 64)
    assert float(keys.abs().max()) == pytest.approx(0.1369, abs=1e-4)
    assert float(keys.std()) == pytest.approx(0.1369 / math.sqrt(3), rel=0.02)


def pruned(**options: Any) -> tuple[Any, PrunedPrompts]:
    model = tiny_vit()
    adaptation = PrunedPrompts(spec_of(model, "e2vpt"), E2vptSettings(prompts=5, prune=True, **options))
    install(model, adaptation)
    adaptation.double()
    return model, adaptation


def test_masks_start_without_effect_and_are_contiguous() -> None:
    model, adaptation = pruned()
    with torch.no_grad():
        assert torch.equal(adaptation.tokens(1), adaptation.prompts[1])
        adaptation.segment_mask[2, 5] = 0.0
        adaptation.token_mask[4] = 0.0
    expected = adaptation.prompts[1].detach().clone()
    expected[2, 15:18] = 0.0  # 16 segments of 3 channels
    expected[4] = 0.0
    assert torch.equal(adaptation.tokens(1), expected)
    assert model(pixels()).isfinite().all()


@pytest.mark.parametrize(
    ("epochs", "phases"),
    [
        (3, [Phase(1, 1), Phase(2, 2, 0.0), Phase(3, 3)]),
        (6, [Phase(1, 2), Phase(1, 2), Phase(3, 3, 0.0), Phase(4, 6), Phase(4, 6), Phase(4, 6)]),
    ],
)
def test_the_last_phase_trains_what_is_left(epochs: int, phases: list[Phase]) -> None:
    _, adaptation = pruned()
    assert [adaptation.phase(epoch, epochs) for epoch in range(1, epochs + 1)] == phases
    for epoch, phase in enumerate(phases, start=1):
        adaptation.begin_epoch(epoch, epochs)
        assert adaptation.token_mask.requires_grad == adaptation.segment_mask.requires_grad == (phase.last < epochs)


def test_the_least_important_are_pruned_and_all_starts_again() -> None:
    model, adaptation = pruned(pruned_prompts=0.4, pruned_segments=0.9)
    start = {name: value.clone() for name, value in (*adaptation.state_dict().items(), *model.state_dict().items())}
    gradients: list[list[Any]] = []
    for epoch in (1, 2):
        adaptation.begin_phase(epoch, 3)
        adaptation.begin_epoch(epoch, 3)
        for seed in range(2):
            model.zero_grad()
            adaptation.zero_grad()
            images = torch.randn(2, 3, 64, 64, dtype=torch.double, generator=torch.manual_seed(seed))
            (model(images) * torch.randn(2, 3, dtype=torch.double, generator=torch.manual_seed(9))).sum().backward()
            adaptation.read_gradients()
            if epoch == 2:
                gradients.append([mask.grad for mask in (adaptation.token_mask, adaptation.segment_mask)])
        assert bool(adaptation.token_importance.any()) == (epoch == 2)
    with torch.no_grad():
        for value in (*adaptation.parameters(), model.head.weight, model.head.bias):
            value.add_(torch.randn_like(value))
    first, second = gradients
    importance = [(one.abs() + two.abs()) / 2 for one, two in zip(first, second, strict=True)]
    torch.testing.assert_close(adaptation.token_importance / 2, importance[0])
    torch.testing.assert_close(adaptation.segment_importance / 2, importance[1])
    adaptation.begin_phase(3, 3)
    assert torch.equal(adaptation.token_mask == 0, importance[0] <= importance[0].sort().values[1])  # 2 of 5
    least = importance[1].sort(dim=1).values[:, 11:12]  # 12 of 16: four always stay
    assert torch.equal(adaptation.segment_mask == 0, importance[1] <= least)
    for name, value in (*adaptation.state_dict().items(), *model.state_dict().items()):
        if "mask" not in name and "importance" not in name:
            assert torch.equal(value, start[name]), name


def test_one_prompt_always_stays() -> None:
    model = tiny_vit()
    options = E2vptSettings(prompts=1, prune=True, pruned_prompts=0.9)
    assert PrunedPrompts(spec_of(model, "e2vpt"), options).dropped_prompts == 0


def study_at(root: Path, epochs: int = 4) -> Study:
    options = {"prompts": 4, "kv_prompts": 2, "prune": True}
    return make_study(
        root,
        method="e2vpt",
        methods={"e2vpt": options},
        train={"epochs": epochs, "lr": 2e-2, "start_block": 4},
    )


class Killed(BaseException):
    """A kill signal, from inside."""


def trained(study: Study, output: str, kill: int = 0) -> TrainResult:
    def die(_: int, log: EpochLog) -> None:
        if log.epoch == kill:
            raise Killed

    watch = Watch(on_epoch=die)
    # From images: no extraction.
    return train(study.settings, study.files(None), study.root / output, study.root / "checkpoints", watch)


def test_pruning_is_resumed_after_any_epoch(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    calm = trained(study, "calm")
    saved = load_file(tmp_path / "calm/model.safetensors")
    masks = saved["adaptation.token_mask"], saved["adaptation.segment_mask"]
    assert [sorted(mask.flatten().tolist()) for mask in masks] == [[0.0] * 2 + [1.0] * 2, [0.0] * 32 + [1.0] * 32]
    assert all(bool((saved[f"adaptation.{kind}_importance"] > 0).all()) for kind in ("token", "segment"))
    # The epoch that measures moves nothing.
    assert (calm.epochs[0].val_loss, calm.epochs[1].lr) == (calm.epochs[1].val_loss, 0.0)
    assert calm.best.epoch > 2
    for epoch in range(1, 5):
        with pytest.raises(Killed):
            trained(study, "killed", kill=epoch)
        again = trained(study, "killed")
        assert (again.resumed_from, again.learnable) == (epoch, calm.learnable)
        files = [tmp_path / name / "model.safetensors" for name in ("calm", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        files = [tmp_path / name / "model.json" for name in ("calm", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_too_few_epochs_to_prune_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.epochs to 3"):
        trained(study_at(tmp_path, epochs=2), "model")
