"""CVPT: the paper's equation, what it adds at the start, and the adapter as which it is served."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_vit import adapted, assert_equal, joined, pixels, self_attention, split_qkv

from schemas.cross_adaptations import CvptSettings
from schemas.specs import AdaptationSpec
from stages.methods.cvpt import CrossPrompts


@pytest.mark.parametrize("normed", [False, True])
def test_it_is_the_cross_attention_of_the_paper(normed: bool) -> None:
    network = adapted("cvpt", first=2, prompts=4, normed=normed)

    def block(number: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        u = x + self_attention(module.attn, module.norm1(x))
        if number >= 2:
            query, _, _ = split_qkv(module.attn, module.norm1(u) if normed else u)
            _, key, value = split_qkv(module.attn, network.adaptation.prompts[number - 2])
            u = u + joined(module.attn, (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value)
        return u + module.mlp(module.norm2(u))

    assert_equal(network, block)


def test_prompts_start_within_the_published_bound_and_add_the_biases() -> None:
    shape = {"depth": 12, "width": 768, "heads": 12, "mlp_width": 3072, "patch": 16, "prefix_tokens": 1}
    spec = AdaptationSpec(
        method="cvpt", classes=2, lpm="vit", image_size=224, first_block=9, hidden=None, options={}, **shape
    )
    prompts = CrossPrompts(spec, CvptSettings()).prompts
    assert prompts.shape == (3, 10, 768)
    assert float(prompts.detach().abs().max()) == pytest.approx(0.01884, abs=1e-5)
    # With prompts of zeros every value is the bias of the values.
    network = adapted("cvpt", prompts=4)
    attention, tokens = network.lpm.blocks[0].attn, torch.randn(2, 5, 64, dtype=torch.double)
    with torch.no_grad():
        network.adaptation.prompts.zero_()
        added = network.adaptation.between(0, network.lpm.blocks[0], tokens) - tokens
        bias = attention.proj(attention.qkv.bias[2 * 64 :])
    torch.testing.assert_close(added, bias.expand_as(added), rtol=0, atol=1e-12)


@pytest.mark.parametrize("normed", [False, True])
def test_it_is_served_as_an_adapter_of_one_hidden_unit_per_head_and_prompt(normed: bool) -> None:
    live = adapted("cvpt", first=1, prompts=4, normed=normed)
    served, keys = copy.deepcopy(live), set(live.state_dict())
    with torch.no_grad():
        served.adaptation.fold(served.lpm)
        assert served.adaptation.into.shape == (5, 2 * 4, 64)
        assert set(served.state_dict()) == keys
        # What is folded is not used again.
        served.adaptation.prompts.fill_(float("nan"))
        torch.testing.assert_close(served.lpm(pixels()), live.lpm(pixels()), rtol=0, atol=1e-10)
