"""DVPT: both methods against their equations, sharing of adapters, and what learns first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_vit import adapted, assert_equal, pixels, plain_logits, self_attention

from schemas.cross_adaptations import DvptReleaseSettings
from schemas.specs import AdaptationSpec
from stages.methods.dvpt import PromptTokens


def adapter(learnt: Any, row: int, u: torch.Tensor) -> torch.Tensor:
    shared = learnt.adapters[row // 3]
    hidden = u @ shared.down.weight.T + shared.down.bias
    return shared.gate * ((hidden * torch.sigmoid(1.702 * hidden)) @ shared.up.weight.T + shared.up.bias)


def test_dvpt_is_the_recommended_reading() -> None:
    network = adapted("dvpt", first=1, prompts=4, latent=5)
    learnt = network.adaptation
    assert len(learnt.adapters) == 2

    def block(number: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        u = x + self_attention(module.attn, module.norm1(x))
        if number == 0:
            return u + module.mlp(module.norm2(u))
        row = number - 1
        o = torch.softmax(learnt.prompts[row] @ u.mT / 64**0.5, dim=-1) @ u
        added = torch.zeros_like(u)
        added[:, 0] = o.mean(dim=1)
        u = u + learnt.gates[row] * added
        return u + module.mlp(module.norm2(u)) + adapter(learnt, row, u)

    assert_equal(network, block)


def test_dvpt_release_is_the_released_vit() -> None:
    network = adapted("dvpt-release", first=1, prompts=4, latent=5)
    learnt = network.adaptation

    def block(number: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        if number == 1:
            # In front of the class token, as published; the order does not matter.
            x = torch.cat([(learnt.prompts + learnt.positions).expand(2, -1, -1), x], dim=1)
        u = x + self_attention(module.attn, module.norm1(x))
        x = u + module.mlp(module.norm2(u))
        if number >= 1:
            x = x + adapter(learnt, number - 1, u)
        return x[:, 4:] if number == 5 else x

    assert_equal(network, block)


def test_gates_are_what_starts_to_learn() -> None:
    network = adapted("dvpt", prompts=4)
    with torch.no_grad():
        network.adaptation.gates.zero_()
        for shared in network.adaptation.adapters:
            shared.gate.zero_()

    def block(_number: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        u = x + self_attention(module.attn, module.norm1(x))
        return u + module.mlp(module.norm2(u))

    found = network.lpm(pixels())
    torch.testing.assert_close(found, plain_logits(network.lpm, pixels(), block), rtol=0, atol=1e-12)
    found.square().sum().backward()
    moved = {
        name for name, value in network.adaptation.named_parameters() if value.grad is not None and value.grad.any()
    }
    assert moved == {"gates", "adapters.0.gate", "adapters.1.gate"}


def test_dvpt_release_starts_with_tokens_of_the_published_size() -> None:
    shape: dict[str, Any] = {"depth": 12, "width": 768, "heads": 12, "mlp_width": 3072, "patch": 16, "prefix_tokens": 1}
    spec = AdaptationSpec(
        method="dvpt-release", classes=2, lpm="vit", image_size=224, first_block=0, hidden=None, **shape
    )
    torch.manual_seed(0)
    released = PromptTokens(spec, DvptReleaseSettings())
    added = released.enter(torch.zeros(2, 197, 768))[:, 1:51].detach()
    assert released.added_tokens == 50 and torch.equal(added[0], added[1])
    assert float(released.positions.detach().std()) == pytest.approx(768**-0.5, rel=0.02)
    assert float(added.std()) == pytest.approx(1.0, abs=0.01)
