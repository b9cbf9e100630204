"""The driver of adaptations, on every supported family: hooks that change nothing, and what each hook receives."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from schemas.errors import UnsupportedModelError
from stages.lpm.adaptation import Adaptation, install, keys_values, mix_with
from stages.lpm.attention import Projected, project, scale_of


def _families() -> Any:
    path = Path(__file__).with_name("test_attention.py")
    spec = importlib.util.spec_from_file_location("attention_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


families = _families()
OTHER_ORDER = {"beit_shared_bias"}
"""Families whose own attention sums in another order than the driver's."""
OTHER_BLOCKS = {"vit_res_post_norm"}
"""Families whose blocks have the norm behind attention and MLP."""


class Neutral(Adaptation):
    """Every hook, each changing nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def between(self, number: int, block: Any, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append(number)
        return tokens

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


class NeutralAttention(Neutral):
    """The attention, too, is computed by the driver."""

    def extra(self, number: int, block: Any) -> None:
        return None


@pytest.mark.parametrize("kind", [Adaptation, Neutral, NeutralAttention])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_hooks_that_change_nothing_give_the_model_bit_for_bit(family: str, kind: type[Adaptation]) -> None:
    model = families.tiny(family)
    pixels = families.images(model)
    with torch.no_grad():
        expected = model(pixels)
        adaptation = kind()
        if family in OTHER_BLOCKS and kind is not Adaptation:
            with pytest.raises(UnsupportedModelError, match="one after the other"):
                install(model, adaptation)
            return
        install(model, adaptation)
        found = model(pixels)
    if kind is NeutralAttention and family in OTHER_ORDER:
        families.assert_same(found, expected)
        return
    assert torch.equal(found, expected)
    if isinstance(adaptation, Neutral):
        assert adaptation.seen == [0, 1]


class AddedTokens(Adaptation):
    """Three tokens behind the prefix that no token attends to."""

    added_tokens = 3

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        added = tokens.new_zeros(len(tokens), 3, tokens.shape[-1])
        return torch.cat([tokens[:, : self.prefix], added, tokens[:, self.prefix :]], dim=1)

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor:
        hidden = torch.zeros(1, tokens.key.shape[2], dtype=tokens.query.dtype)
        hidden[:, self.prefix : self.prefix + 3] = float("-inf")
        return F.scaled_dot_product_attention(tokens.query, tokens.key, tokens.value, attn_mask=hidden, scale=scale)


@pytest.mark.parametrize("family", ["vit", "eva02_fused", "dinov2", "dinov3", "vit_registers_average"])
def test_added_tokens_have_no_position_and_are_cut_before_the_head(family: str) -> None:
    model = families.tiny(family)
    pixels = families.images(model)
    with torch.no_grad():
        expected = model(pixels)
        install(model, AddedTokens(model.num_prefix_tokens))
        families.assert_same(model(pixels), expected)


def projected(width: int, seed: int = 0, bias: bool = False) -> Projected:
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, 2, 3, 5, width, dtype=torch.double, requires_grad=True)
    return Projected(query, key, value, torch.randn(1, 3, 5, 5, dtype=torch.double) if bias else None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [8, 21])
def test_extra_keys_and_a_sink_are_those_of_an_explicit_softmax(width: int, bias: bool) -> None:
    tokens, scale = projected(width, bias=bias), width**-0.5
    extra = torch.randn(2, 1, 3, 4, width, dtype=torch.double, requires_grad=True)
    sink = torch.randn(5, dtype=torch.double, requires_grad=True)
    found = mix_with(tokens, scale, (extra[0], extra[1]), sink)
    scores = tokens.query @ tokens.key.mT * scale + (0 if tokens.bias is None else tokens.bias)
    more = tokens.query @ extra[0].mT * scale
    logits = torch.cat([more, scores, sink[:, None].expand(2, 3, 5, 1)], dim=-1).softmax(dim=-1)
    values = torch.cat([extra[1].expand(2, -1, -1, -1), tokens.value], dim=2)
    expected = logits[..., :-1] @ values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inputs = [tokens.query, tokens.key, tokens.value, extra, sink]
    weight = torch.randn_like(found)
    for mine, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["vit_layer_scale", "vit_qk_norm", "dinov2"])
def test_prompts_as_keys_and_values_are_prompts_as_tokens(family: str) -> None:
    """Identity 5: prompts that are replaced at every block are constant keys and values."""

    class Deep(Adaptation):
        def __init__(self, prompts: torch.Tensor) -> None:
            super().__init__()
            self.prompts = nn.Parameter(prompts)

        def extra(self, number: int, block: Any) -> Any:
            return keys_values(block, self.prompts[number])

    model = families.tiny(family)
    prompts = torch.randn(2, 4, 48, dtype=torch.double)
    as_tokens = prompts.clone().requires_grad_()
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(families.images(model)))))
    for block, mine in zip(model.blocks, as_tokens, strict=True):
        joined = torch.cat([mine.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = block(joined)[:, 4:]
    expected = model.forward_head(model.norm(tokens))
    adaptation = Deep(prompts)
    install(model, adaptation)
    found = model(families.images(model))
    families.assert_same(found, expected)
    (mine,) = torch.autograd.grad(found.square().sum(), [adaptation.prompts])
    (other,) = torch.autograd.grad(expected.square().sum(), [as_tokens])
    torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_scale_and_projection_are_those_of_the_block() -> None:
    model = families.tiny("vit")
    tokens = torch.randn(1, 6, 48, dtype=torch.double)
    key, value = keys_values(model.blocks[0], tokens[0], normed=False)
    direct = project(model.blocks[0].attn, tokens)
    assert torch.equal(key, direct.key) and torch.equal(value, direct.value)
    assert scale_of(model.blocks[0].attn) == pytest.approx(16**-0.5)
