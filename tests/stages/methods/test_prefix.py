"""Prefix tuning and PT-PEFT: equations, numbers at the start, and LoRA in every family."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapted_models import assert_same_with_gradients, load_families, pixels, spec_of, tiny_vit, written_out

from schemas.prompt_adaptations import PrefixSettings, PtPeftSettings
from stages.lpm.adaptation import install, mix_with
from stages.lpm.attention import Projected
from stages.methods.prefix import Prefix, PrefixThenLowRank
from stages.phases import Phase

families = load_families()


def moved(adaptation: Prefix) -> Prefix:
    """Far from the initial values."""
    with torch.no_grad():
        for value in adaptation.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return adaptation


def test_a_prefix_is_keys_and_values_in_front_of_those_of_each_head() -> None:
    model = tiny_vit()
    adaptation = moved(Prefix(spec_of(model, "prefix"), PrefixSettings(prompts=4)).double())
    keys, values = (value.detach().clone().requires_grad_() for value in (adaptation.keys, adaptation.values))
    expected = written_out(model, pixels(), keys=list(keys), values=list(values))
    install(model, adaptation)
    assert_same_with_gradients(model(pixels()), expected, [adaptation.keys, adaptation.values], [keys, values])


def test_a_prefix_splits_the_softmax() -> None:
    """Identity 6."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8, dtype=torch.double)
    more_keys, more_values = torch.randn(2, 1, 3, 4, 8, dtype=torch.double)
    scale = 8**-0.5
    lse, own = ((query @ keys.mT * scale).logsumexp(dim=-1, keepdim=True) for keys in (key, more_keys))
    gate = (own - lse).sigmoid()
    attended = F.scaled_dot_product_attention(query, key, value, scale=scale)
    of_prefix = F.scaled_dot_product_attention(
        query, more_keys.expand(2, -1, -1, -1), more_values.expand(2, -1, -1, -1), scale=scale
    )
    found = mix_with(Projected(query, key, value), scale, (more_keys, more_values))
    torch.testing.assert_close(found, (1 - gate) * attended + gate * of_prefix, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "left"), [(16, 0.925), (10, 0.952)])
def test_a_new_prefix_takes_part_in_the_softmax(count: int, left: float) -> None:
    spec = spec_of(tiny_vit(), "prefix").model_copy(update={"width": 768, "heads": 12})
    torch.manual_seed(0)
    adaptation = Prefix(spec, PrefixSettings(prompts=count))
    assert float(adaptation.keys.std()) == pytest.approx(0.02, rel=0.05)
    assert not adaptation.values.any()
    # Flat attention over the 197 tokens of ViT-B/16.
    tokens = Projected(*(torch.zeros(1, 12, 197, 64), torch.zeros(1, 12, 197, 64), torch.ones(1, 12, 197, 64)))
    mixed = mix_with(tokens, 64**-0.5, adaptation.extra(0, None))
    assert float(mixed.mean()) == pytest.approx(197 / (197 + count)) == pytest.approx(left, abs=1e-3)


def test_pt_peft_is_a_prefix_and_low_rank_changes_of_the_projections() -> None:
    model = tiny_vit()
    adaptation = PrefixThenLowRank(spec_of(model, "pt-peft"), PtPeftSettings(prompts=4, rank=2))
    install(model, adaptation.double())
    moved(adaptation.double())
    names = [name for name, _ in adaptation.named_parameters()]
    other = {name: value.detach().clone().requires_grad_() for name, value in adaptation.named_parameters()}
    written = tiny_vit()
    for number, block in enumerate(written.blocks):
        weight = block.attn.qkv.weight.detach()
        del block.attn.qkv.weight
        block.attn.qkv.weight = weight + other[f"updates.{number}.up"] @ other[f"updates.{number}.down"]
    expected = written_out(written, pixels(), keys=list(other["keys"]), values=list(other["values"]))
    mine = dict(adaptation.named_parameters())
    found = model(pixels())
    assert_same_with_gradients(found, expected, [mine[name] for name in names], [other[name] for name in names])
    with torch.no_grad():
        before = model.blocks[0].attn.qkv.weight.clone()
        shared = model.blocks[0].attn.qkv.weight
        adaptation.fold(model)
        torch.testing.assert_close(model(pixels()), found, rtol=0, atol=1e-10)
    assert torch.equal(shared, before) and not torch.equal(model.blocks[0].attn.qkv.weight, before)


@pytest.mark.parametrize(
    "family",
    ["vit_qk_norm", "dinov2_registers", "eva_first", "eva02_separate", "eva02_fused", "dinov3", "beit", "relpos_mlp"],
)
def test_low_rank_changes_act_and_fold_in_every_family(family: str) -> None:
    model = families.tiny(family)
    spec = spec_of(model, "pt-peft")
    adaptation = PrefixThenLowRank(spec, PtPeftSettings(prompts=3, rank=2))
    install(model, adaptation)
    adaptation.double()
    count = sum(value.numel() for value in adaptation.updates.parameters())
    assert count == 2 * 4 * 2 * 48, "as many for one projection as for two"
    with torch.no_grad():
        start = model(families.images(model))
        moved(adaptation)
        live = model(families.images(model))
        adaptation.begin_epoch(1, 2)
        without = model(families.images(model))
        adaptation.begin_epoch(2, 2)
        assert float((live - without).abs().max()) > 1e-6
        assert float((start - without).abs().max()) > 1e-6
        adaptation.fold(model)
        families.assert_same(model(families.images(model)), live)


def test_low_rank_changes_start_at_zero_and_as_published() -> None:
    model = tiny_vit()
    torch.manual_seed(0)
    adaptation = PrefixThenLowRank(spec_of(model, "pt-peft"), PtPeftSettings(rank=8))
    install(model, adaptation)
    for name, value in adaptation.updates.named_parameters():
        if name.endswith("up"):
            assert not value.any()
        else:
            assert 0.95 / math.sqrt(48) < float(value.abs().max()) <= 1 / math.sqrt(48)


@pytest.mark.parametrize(
    ("epochs", "phases"),
    [
        (1, [Phase(1, 1, 0.5)]),
        (2, [Phase(1, 1), Phase(2, 2, 0.5)]),
        (5, [Phase(1, 2), Phase(1, 2), Phase(3, 5, 0.5), Phase(3, 5, 0.5), Phase(3, 5, 0.5)]),
    ],
)
def test_half_of_the_epochs_are_without_low_rank_changes(epochs: int, phases: list[Phase]) -> None:
    model = tiny_vit()
    adaptation = PrefixThenLowRank(spec_of(model, "pt-peft"), PtPeftSettings())
    install(model, adaptation)
    assert [adaptation.phase(epoch, epochs) for epoch in range(1, epochs + 1)] == phases
    for epoch, phase in enumerate(phases, start=1):
        adaptation.begin_epoch(epoch, epochs)
        learning = {value.requires_grad for value in adaptation.updates.parameters()}
        assert learning == {phase.rate == 0.5}
        assert adaptation.keys.requires_grad
