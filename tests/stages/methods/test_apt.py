"""APT: the paper's equation, its start, and the gate that is not published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_vit import adapted, assert_equal, self_attention

from schemas.cross_adaptations import AptSettings
from schemas.specs import AdaptationSpec
from stages.methods.apt import ApproximatedPrompts


@pytest.mark.parametrize("zero_gate", [False, True])
def test_it_is_the_equation_of_the_paper(zero_gate: bool) -> None:
    network = adapted("apt", first=2, prompts=5, zero_gate=zero_gate)
    learnt = network.adaptation

    def block(number: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        z = module.norm1(x)
        y = self_attention(module.attn, z)
        if number >= 2:
            row = number - 2
            prompts, w1, w2, s = (v[row] for v in (learnt.prompts, learnt.down, learnt.up, learnt.log_scale))
            a = torch.relu(torch.einsum("bnd,md->bnm", z, prompts + prompts @ w1.T @ w2.T))
            w = a.max(dim=2).values.detach().unsqueeze(2)
            e = w * torch.einsum("bnm,md->bnd", a, prompts)
            y = torch.exp(s) * (y + (learnt.gate[row] if zero_gate else 1.0) * e)
        u = x + y
        return u + module.mlp(module.norm2(u))

    assert_equal(network, block)


@pytest.mark.parametrize(("prompts", "expected"), [(50, 0.07), (200, 0.18)])
def test_what_it_adds_at_the_start_is_the_published_amount_unless_it_is_gated(prompts: int, expected: float) -> None:
    shape = {"depth": 12, "width": 768, "heads": 12, "mlp_width": 3072, "patch": 16, "prefix_tokens": 1}
    spec = AdaptationSpec(
        method="apt", classes=2, lpm="vit", image_size=224, first_block=11, hidden=None, options={}, **shape
    )
    torch.manual_seed(0)
    normed, output = torch.randn(2, 197, 768), torch.zeros(2, 197, 768)
    with torch.no_grad():
        published = ApproximatedPrompts(spec, AptSettings(prompts=prompts)).attention_out(11, output, normed)
        gated = ApproximatedPrompts(spec, AptSettings(prompts=prompts, zero_gate=True))
        assert torch.equal(gated.attention_out(11, output + 1, normed), output + 1)
    assert float(published.square().mean().sqrt()) == pytest.approx(expected, abs=0.01)
