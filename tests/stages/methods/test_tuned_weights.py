"""BitFit, LN-Tune, AttnScale, LN + scale and DRA against their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from schemas.errors import UnsupportedModelError
from schemas.specs import AdaptationSpec
from stages.methods.adapted_lpm import AdaptedLpm
from stages.methods.base import gradient_method

SHAPE = {"depth": 2, "width": 48, "heads": 3, "mlp_width": 192, "patch": 16, "prefix_tokens": 1, "image_size": 64}
EXACT = {"rtol": 0, "atol": 1e-10}


def built(method: str, **changes: Any) -> Any:
    """A network on a tiny ViT in float64, no weight of which is zero, and its adaptation moved from its start."""
    raw = {"method": method, "classes": 3, "lpm": "vit_base_patch16_224", "first_block": 0, "hidden": None, **SHAPE}
    options = changes.pop("model", {})
    spec = AdaptationSpec.model_validate({**raw, **changes})
    lpm = timm.create_model(
        "vit_base_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=3, **options
    )
    torch.manual_seed(0)
    network = AdaptedLpm(spec, lpm, gradient_method(method)._make(spec, None)).double().eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return network


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def literal(model: Any, mix: Callable[..., torch.Tensor], offsets: Any = None) -> torch.Tensor:
    """Logits of a ViT, written from its equations; `mix(block, q, k, v)` is its attention, offsets those of DRA."""
    x = model.patch_embed.proj(pixels()).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1) + model.pos_embed
    for number, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        y = block.attn.proj(mix(number, q, k, v).transpose(1, 2).reshape(2, 17, 48))
        x = x + y + (0 if offsets is None else offsets.attention[number])
        mlp = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        x = x + mlp + (0 if offsets is None else offsets.mlp[number])
    logits: torch.Tensor = model.head(model.norm(x)[:, 0])
    return logits


def plain(_number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / 4).softmax(dim=-1) @ v


def assert_same_gradients(network: Any, expected: torch.Tensor) -> None:
    """That output and gradients of all trained parameters are those of an expected output."""
    found = network.lpm(pixels())
    torch.testing.assert_close(found, expected, **EXACT)
    trained = [value for value in network.parameters() if value.requires_grad]
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), trained, retain_graph=True)
    others = torch.autograd.grad((expected * weight).sum(), trained)
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in mine)
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("method", ["attn-scale", "ln-scale"])
def test_a_factor_per_head_multiplies_the_logits(method: str) -> None:
    network = built(method)
    alpha = 1 + network.adaptation.factors

    def mix(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (alpha[number][:, None, None] * (q @ k.mT) / 4).softmax(dim=-1) @ v

    assert_same_gradients(network, literal(network.lpm, mix))


def test_a_factor_per_pair_of_tokens_multiplies_the_weights_of_all_heads() -> None:
    network = built("attn-scale-matrix")
    factors = 1 + network.adaptation.factors

    def mix(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (factors[number] * (q @ k.mT / 4).softmax(dim=-1)) @ v

    assert_same_gradients(network, literal(network.lpm, mix))


def test_the_factors_of_pairs_refuse_another_resolution() -> None:
    network = built("attn-scale-matrix", model={"dynamic_img_size": True})
    network.lpm(pixels())
    with pytest.raises(UnsupportedModelError, match="26 tokens instead of 17"):
        network.lpm(torch.randn(1, 3, 80, 80).double())
    built("attn-scale", model={"dynamic_img_size": True}).lpm(torch.randn(1, 3, 80, 80).double())


def test_offsets_are_added_to_attention_and_mlp() -> None:
    network = built("dra")
    assert_same_gradients(network, literal(network.lpm, plain, network.adaptation))


def test_offsets_without_layer_scale_are_the_biases_of_proj_and_fc2() -> None:
    """Why DRA and BitFit of two layers are the same."""
    dra, bitfit = built("dra"), built("bitfit")
    dra.load_state_dict({key: value for key, value in bitfit.state_dict().items() if "head." in key}, strict=False)
    bitfit.use_lpm(dra.lpm)
    with torch.no_grad():
        for number, block in enumerate(bitfit.lpm.blocks):
            for layer, name in ((block.attn.proj, "attention"), (block.mlp.fc2, "mlp")):
                source = dra.lpm.get_submodule(f"blocks.{number}.{'attn.proj' if name == 'attention' else 'mlp.fc2'}")
                layer.bias.copy_(source.bias + getattr(dra.adaptation, name)[number])
        kept = {"attn.proj.bias", "mlp.fc2.bias"}
        for key, value in bitfit.lpm.named_parameters():
            if not key.endswith(tuple(kept)):
                value.copy_(dict(dra.lpm.named_parameters())[key])
    found, expected = dra.lpm(pixels()), bitfit.lpm(pixels())
    torch.testing.assert_close(found, expected, **EXACT)
    found.square().sum().backward()
    expected.square().sum().backward()
    for number, block in enumerate(bitfit.lpm.blocks):
        torch.testing.assert_close(dra.adaptation.attention.grad[number], block.attn.proj.bias.grad, **EXACT)
        torch.testing.assert_close(dra.adaptation.mlp.grad[number], block.mlp.fc2.bias.grad, **EXACT)


def test_folded_offsets_leave_the_shared_weights_alone() -> None:
    network = built("dra", model={"init_values": 0.5})
    shared = network.lpm.blocks[1].attn.proj.bias
    before = shared.clone()
    expected = network.lpm(pixels())
    with torch.no_grad():
        network.adaptation.fold(network.lpm)
        torch.testing.assert_close(network.lpm(pixels()), expected, **EXACT)
    assert torch.equal(shared, before)
    assert not torch.equal(network.lpm.blocks[1].attn.proj.bias, before)


@pytest.mark.parametrize(("model", "dead"), [({}, True), ({"qk_norm": True}, False)])
def test_the_key_third_of_the_biases_is_dead_in_a_plain_model(model: dict[str, Any], dead: bool) -> None:
    """Identity 9."""
    network = built("bitfit", model=model)
    network.lpm(pixels()).square().sum().backward()
    query, key, value = network.lpm.blocks[0].attn.qkv.bias.grad.chunk(3)
    largest = float(query.abs().max())
    assert largest > 1e-3 and float(value.abs().max()) > 1e-3
    assert (float(key.abs().max()) < 1e-12 * max(1.0, largest)) == dead


@pytest.mark.parametrize(
    ("method", "first", "hidden", "some", "others"),
    [
        ("bitfit", 0, None, {"patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "norm.bias"}, {"cls_token"}),
        ("bitfit", 0, 0, {"blocks.0.norm1.bias"}, {"patch_embed.proj.bias"}),
        ("bitfit", 1, None, {"blocks.1.mlp.fc1.bias"}, {"patch_embed.proj.bias", "blocks.0.norm1.bias"}),
        ("ln-tune", 0, None, {"blocks.0.norm1.weight", "blocks.1.norm2.bias", "norm.weight"}, {"cls_token"}),
        ("ln-tune", 1, None, {"blocks.1.norm1.weight"}, {"blocks.0.norm1.weight", "blocks.1.attn.q_norm.weight"}),
    ],
)  # fmt: skip
def test_what_runs_from_the_first_adapted_block_upward_is_trained(
    method: str, first: int, hidden: int | None, some: set[str], others: set[str]
) -> None:
    network = built(method, first_block=first, hidden=hidden, model={"qk_norm": method == "ln-tune"})
    assert isinstance(network, nn.Module)
    trained = {name for name, value in network.lpm.named_parameters() if value.requires_grad}
    assert some | {"head.weight", "head.bias"} <= trained
    assert not others & trained
