"""LoRA, DoRA, IA3 and VeRA through peft: equations, what is saved, and what is folded into every kind of LPM."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from schemas.errors import BundleError, PlatformError
from schemas.methods import METHODS
from schemas.specs import AdaptationSpec
from stages.methods.base import gradient_method

SHAPE = {"depth": 2, "width": 48, "heads": 3, "mlp_width": 192, "patch": 16, "prefix_tokens": 1, "image_size": 64}
TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
METHODS_OF_PEFT = ("lora", "dora", "ia3", "vera")


def built(
    method: str, monkeypatch: pytest.MonkeyPatch, name: str = "vit_base_patch16_224", first: int = 0
) -> tuple[Any, Any]:
    """An LPM without zeros among its weights, and a network with them in float64, moved from its start."""
    side = 4 * (14 if "patch14" in name else 16)
    options = {} if method == "ia3" else {"rank": 4}
    raw = {"method": method, "classes": 3, "lpm": name, "first_block": first, "hidden": None, "options": options}
    spec = AdaptationSpec.model_validate({**raw, **SHAPE, "image_size": side})
    monkeypatch.setattr(
        "stages.methods.adapted_lpm.build_lpm", lambda _: timm.create_model(name, img_size=side, **TINY)
    )
    torch.manual_seed(0)
    lpm = timm.create_model(name, img_size=side, **TINY).double().eval()
    with torch.no_grad():
        for value in lpm.parameters():
            value.copy_(0.3 * torch.randn_like(value) + 0.1)
    network: Any = gradient_method(method).build(spec).double().eval()
    network.start_from(lpm)
    return lpm, network


def move(network: Any) -> None:
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))


def pixels(lpm: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *lpm.patch_embed.img_size, dtype=torch.double, generator=generator)


def literal(method: str, x: torch.Tensor, base: Any, state: dict[str, torch.Tensor], layer: Any) -> torch.Tensor:
    """The output of a wrapped layer, from the equations."""
    weight, bias = base.weight, base.bias
    if method == "ia3":
        factor = state["ia3_l.default"]
        return F.linear(x * factor, weight, bias) if factor.shape[0] == 1 else F.linear(x, weight, bias) * factor[:, 0]
    if method == "vera":
        low = (x @ layer.vera_A["default"].T) * state["vera_lambda_d.default"]
        return F.linear(x, weight, bias) + (low @ layer.vera_B["default"].T) * state["vera_lambda_b.default"]
    update = state["lora_B.default.weight"] @ state["lora_A.default.weight"]
    if method == "lora":
        return F.linear(x, weight + update, bias)
    direction = (weight + update) / (weight + update).norm(dim=1, keepdim=True).detach()
    return F.linear(x, state["lora_magnitude_vector.default.weight"][:, None] * direction, bias)


@pytest.mark.parametrize("method", METHODS_OF_PEFT)
def test_output_and_gradients_are_those_of_the_equations(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lpm, network = built(method, monkeypatch)
    move(network)
    names = ["attn.qkv", "mlp.fc2"] if method == "ia3" else ["attn.qkv"]
    for name in names:
        layer, base = network.lpm.blocks[1].get_submodule(name), lpm.blocks[1].get_submodule(name)
        x = torch.randn(5, base.in_features, dtype=torch.double)
        state = {key: value for key, value in layer.named_parameters() if "base_layer" not in key}
        assert all(value.requires_grad for value in state.values())
        found, expected = layer(x), literal(method, x, base, state, layer)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        weight = torch.randn_like(found)
        inputs = list(state.values())
        for mine, other in zip(
            torch.autograd.grad((found * weight).sum(), inputs),
            torch.autograd.grad((expected * weight).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


FAMILIES = [
    "vit_base_patch16_224", "eva02_base_patch14_224", "eva_large_patch14_196", "beit_base_patch16_224",
    "vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_giant_patch14_dinov2",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS_OF_PEFT)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_lpm_starts_as_itself_and_is_folded(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    lpm, network = built(method, monkeypatch, name, first=1)
    before = {key: value.clone() for key, value in lpm.state_dict().items()}

    def features(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.forward_features(pixels(lpm))  # type: ignore[no-any-return]

    expected = features(lpm)
    largest = float(expected.abs().max())
    torch.testing.assert_close(features(network.lpm), expected, rtol=0, atol=1e-9 * largest)
    move(network)
    live = features(network.lpm)
    assert float((live - expected).abs().max()) > 1e-3 * largest
    state = {key: value.clone() for key, value in network.state_dict().items()}
    served: Any = gradient_method(method).build(network.spec).double().eval()
    served.load_state_dict(state)
    served.use_lpm(lpm)
    torch.testing.assert_close(features(served.lpm), live, rtol=0, atol=1e-9 * largest)
    assert {key.removeprefix("lpm.") for key in dict(served.named_parameters())} == set(dict(lpm.named_parameters()))
    for key, value in lpm.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("method", METHODS_OF_PEFT)
def test_a_bundle_has_the_parameters_of_adapted_blocks_and_the_head_only(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network = built(method, monkeypatch, first=1)
    saved = set(network.state_dict())
    expected = {
        "lora": {"attn.qkv.lora_A.default.weight", "attn.qkv.lora_B.default.weight"},
        "ia3": {"attn.qkv.ia3_l.default", "mlp.fc2.ia3_l.default"},
        "vera": {"attn.qkv.vera_lambda_b.default", "attn.qkv.vera_lambda_d.default"},
    }
    expected["dora"] = expected["lora"] | {"attn.qkv.lora_magnitude_vector.default.weight"}
    names = {f"lpm.blocks.1.{name}" for name in expected[method]} | {"lpm.head.weight", "lpm.head.bias"}
    assert saved == names | ({"adaptation.projection_sums"} if method == "vera" else set())


def test_other_random_projections_than_those_of_training_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lpm, network = built("vera", monkeypatch)
    state = dict(network.state_dict())
    monkeypatch.setattr("stages.methods.peft_layers.PROJECTION_SEED", 1)
    served: Any = gradient_method("vera").build(network.spec).double()
    served.load_state_dict(state)
    with pytest.raises(BundleError, match="random projections"):
        served.use_lpm(lpm)


@pytest.mark.parametrize("method", METHODS_OF_PEFT)
def test_without_peft_the_error_names_the_extra_and_the_row_is_there(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert method in METHODS
    with pytest.raises(PlatformError, match=r'pip install "fpt-vit\[peft\]"'):
        built(method, monkeypatch)
