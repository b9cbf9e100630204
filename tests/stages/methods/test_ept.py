"""EPT: the published form, the lean form, their start, their optimisers, and the maps of their factors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plain_vit import adapted, assert_equal, joined, pixels, self_attention, split_qkv

from schemas.prompt_adaptations import EptSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import mix_with
from stages.lpm.attention import Projected
from stages.methods.ept import MAP, EmbeddedLogits, EmbeddedPrompts

SHAPE: dict[str, Any] = {
    "classes": 2, "lpm": "vit", "image_size": 224, "depth": 1, "first_block": 0, "hidden": None, "width": 64,
    "heads": 2, "mlp_width": 192, "patch": 16, "prefix_tokens": 1,
}  # fmt: skip
SPEC = AdaptationSpec(method="ept", **SHAPE)
"""One block at 224 pixels: 197 tokens, as ViT-B."""


def projected(count: int = 197, bias: bool = False) -> Projected:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 2, count, 32, dtype=torch.double, requires_grad=True)
    return Projected(query, key, value, torch.randn(1, 2, count, count, dtype=torch.double) if bias else None)


def test_it_is_the_equation_of_the_paper() -> None:
    network = adapted("ept", first=2, prompts=4)

    def block(number: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        z = module.norm1(x)
        if number < 2:
            y = self_attention(module.attn, z)
        else:
            q, k, v = split_qkv(module.attn, z)
            prompts = network.adaptation.prompts[number - 2].expand(2, 2, -1, -1)
            logits = torch.cat([prompts, q @ k.mT / math.sqrt(32)], dim=-1)
            y = joined(module.attn, torch.softmax(logits, dim=-1)[..., 4:] @ v)
        u = x + y
        return u + module.mlp(module.norm2(u))

    assert_equal(network, block)


@pytest.mark.parametrize("bias", [False, True])
def test_the_lean_form_is_the_published_one_in_output_and_gradients(bias: bool) -> None:
    tokens, scale = projected(bias=bias), 32**-0.5
    published = EmbeddedPrompts(SPEC, EptSettings(prompts=7)).double()
    inputs = [tokens.query, tokens.key, tokens.value, published.prompts]
    results = []
    for mixed in (published.mix(0, tokens, scale), mix_with(tokens, scale, sink=published.logits()[0])):
        assert mixed is not None
        weight = torch.linspace(-1, 1, mixed.numel(), dtype=torch.double).view_as(mixed)
        results.append((mixed, *torch.autograd.grad((mixed * weight).sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_model_of_either_form_has_the_same_logits() -> None:
    published, lean = adapted("ept", prompts=4), adapted("ept-lse", prompts=4)
    with torch.no_grad():
        lean.load_state_dict({k: v for k, v in published.state_dict().items() if "adaptation" not in k}, strict=False)
        lean.use_lpm(published.lpm)
        lean.adaptation.offsets.copy_(published.adaptation.logits() - math.log(4))
        torch.testing.assert_close(lean.lpm(pixels()), published.lpm(pixels()), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("prompts", "factor"), [(100, 0.66), (600, 0.25)])
@pytest.mark.parametrize("form", [EmbeddedPrompts, EmbeddedLogits])
def test_at_flat_attention_it_starts_with_the_published_factor(form: Any, prompts: int, factor: float) -> None:
    flat = torch.zeros(1, 2, 197, 32)
    tokens = Projected(flat, flat, torch.ones_like(flat))
    adaptation = form(SPEC, EptSettings(prompts=prompts))
    mixed = adaptation.mix(0, tokens, 32**-0.5)
    if mixed is None:
        mixed = mix_with(tokens, 32**-0.5, sink=adaptation.sink(0))
    assert 197 / (197 + prompts) == pytest.approx(factor, abs=0.005)
    torch.testing.assert_close(mixed, torch.full_like(mixed, 197 / (197 + prompts)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_equal_steps_of_both_forms(name: str) -> None:
    """Identity 4: SGD takes the rate over d_p and the decay times d_p, AdamW the same; from equal initial logits."""
    count, prompts, scale = 9, 5, 32**-0.5
    spec = SPEC.model_copy(update={"image_size": 32, "patch": 16, "prefix_tokens": 5})
    options = EptSettings(prompts=prompts)
    published, lean = EmbeddedPrompts(spec, options).double(), EmbeddedLogits(spec, options).double()
    with torch.no_grad():
        published.prompts.zero_()
    rate, decay = 0.05, 0.01
    optimizers = [
        torch.optim.SGD([published.prompts], lr=rate, momentum=0.9, weight_decay=decay),
        torch.optim.SGD([lean.offsets], lr=rate / prompts, momentum=0.9, weight_decay=decay * prompts),
    ]
    if name == "adamw":
        optimizers = [
            torch.optim.AdamW([value], lr=rate, weight_decay=decay, eps=1e-14)
            for value in (published.prompts, lean.offsets)
        ]
    target = torch.randn(2, 2, count, 32, dtype=torch.double)
    tokens = projected(count)
    for _ in range(30):
        mixed = published.mix(0, tokens, scale), mix_with(tokens, scale, sink=lean.sink(0))
        for optimizer, one in zip(optimizers, mixed, strict=True):
            assert one is not None
            optimizer.zero_grad()
            (one - target).square().sum().backward()
            optimizer.step()
    assert float(lean.offsets.detach().abs().min()) > 1e-3
    torch.testing.assert_close(lean.logits(), published.logits(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["ept", "ept-lse"])
def test_maps_are_what_a_row_of_attention_keeps_beside_the_prompts(method: str) -> None:
    network = adapted(method, first=3, prompts=4)
    prompts, seen = network.adaptation.logits().detach(), []
    for number, block in enumerate(network.lpm.blocks[3:]):
        block.norm1.register_forward_hook(lambda *call, number=number: seen.append((number, call[2])))
    with torch.no_grad():
        before = network.lpm(pixels())
        seen.clear()
        maps = network.adaptation.maps(lambda: network.lpm(pixels()))
        expected = []
        for number, normed in seen:
            q, k, _ = split_qkv(network.lpm.blocks[3 + number].attn, normed)
            logits = torch.cat([prompts[number].expand(2, 2, -1)[..., None], q @ k.mT / math.sqrt(32)], dim=-1)
            expected.append(logits.softmax(dim=-1)[..., 1:].sum(dim=-1).mean(dim=1)[:, 1:].unflatten(-1, (4, 4)))
        assert torch.equal(network.lpm(pixels()), before), "nothing is left of the recording"
    assert list(maps) == [MAP] and maps[MAP].shape == (2, 3, 4, 4)
    torch.testing.assert_close(maps[MAP], torch.stack(expected, dim=1), rtol=0, atol=1e-10)
