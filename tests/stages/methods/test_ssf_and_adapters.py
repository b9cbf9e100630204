"""SSF, adapters and the MLP head against their equations, their starts, and what is folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from study import evaluated_and_predicted, make_study
from torch import nn

from schemas.probe_specs import PooledSpec
from schemas.specs import AdaptationSpec
from stages.methods.adapted_lpm import AdaptedLpm, _options
from stages.methods.adapters import SCALE
from stages.methods.base import gradient_method
from stages.methods.batch import Batch
from stages.train.trainer import train

SHAPE = {"depth": 2, "width": 48, "heads": 3, "mlp_width": 192, "patch": 16, "prefix_tokens": 1, "image_size": 64}
EXACT = {"rtol": 0, "atol": 1e-10}
TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}


def built(method: str, name: str = "vit_base_patch16_224", moved: bool = True, **options: Any) -> Any:
    """A network on a tiny model in float64; `moved`: no weight is zero, and the adaptation is not at its start."""
    raw = {"method": method, "classes": 3, "lpm": name, "first_block": 0, "hidden": None, "options": options, **SHAPE}
    spec = AdaptationSpec.model_validate(raw)
    patch = 14 if "patch14" in name else 16
    lpm = timm.create_model(name, **{**TINY, "img_size": 4 * patch})
    torch.manual_seed(0)
    adaptation = gradient_method(method)._make(spec, _options(spec))  # type: ignore[attr-defined]
    network = AdaptedLpm(spec, lpm, adaptation).double().eval()
    if moved:
        with torch.no_grad():
            for value in network.parameters():
                value.add_(0.2 * torch.randn_like(value))
    return network


def pixels(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.double, generator=torch.Generator().manual_seed(1))


class Direct(nn.Module):
    """A ViT written from its equations, with `op(name, x)` behind every operation."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.model, self.adaptation = network.lpm, network.adaptation

    def op(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x

    def mlp_out(self, number: int, output: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return output

    def forward(self) -> torch.Tensor:
        model = self.model
        weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        x = self.op("patch_embed", F.conv2d(pixels(), weight, bias, stride=16).flatten(2).mT)
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1) + model.pos_embed
        for number, block in enumerate(model.blocks):

            def run(name: str, x: torch.Tensor, block: Any = block, number: int = number) -> torch.Tensor:
                layer = block.get_submodule(name)
                y = F.linear(x, layer.weight, layer.bias) if "." in name else norm(layer, x)
                return self.op(f"blocks_{number}_{name.replace('.', '_')}", y)

            q, k, v = run("attn.qkv", run("norm1", x)).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
            mixed = (q @ k.mT / 4).softmax(dim=-1) @ v
            u = x + run("attn.proj", mixed.transpose(1, 2).reshape(2, 17, 48))
            x = u + self.mlp_out(number, run("mlp.fc2", F.gelu(run("mlp.fc1", run("norm2", u)))), u)
        logits: torch.Tensor = model.head(self.op("norm", norm(model.norm, x))[:, 0])
        return logits


def norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (48,), layer.weight, layer.bias, 1e-6)


class DirectSsf(Direct):
    def op(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.adaptation.scales[name]) + self.adaptation.shifts[name]


class DirectAdapter(Direct):
    def mlp_out(self, number: int, output: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        down, up = self.adaptation.down[number], self.adaptation.up[number]
        return output + F.gelu(output @ down.weight.T + down.bias) @ up.weight.T + up.bias


class DirectAdaptFormer(Direct):
    def mlp_out(self, number: int, output: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        down, up = self.adaptation.down[number], self.adaptation.up[number]
        return output + SCALE * (F.relu(u @ down.weight.T + down.bias) @ up.weight.T + up.bias)


@pytest.mark.parametrize(
    ("method", "direct", "options"),
    [
        ("ssf", DirectSsf, {}),
        ("adapter", DirectAdapter, {"width": 5}),
        ("adaptformer", DirectAdaptFormer, {"width": 5}),
    ],
)
def test_output_and_gradients_are_those_of_the_equations(
    method: str, direct: type[Direct], options: dict[str, Any]
) -> None:
    network = built(method, **options)
    found, expected = network.lpm(pixels()), direct(network)()
    torch.testing.assert_close(found, expected, **EXACT)
    trained = [value for value in network.parameters() if value.requires_grad]
    weight = torch.randn_like(found)
    for mine, other in zip(
        torch.autograd.grad((found * weight).sum(), trained), torch.autograd.grad((expected * weight).sum(), trained),
        strict=True,
    ):  # fmt: skip
        assert float(mine.abs().max()) > 0
        torch.testing.assert_close(mine, other, **EXACT)


FOLDED = [
    ("vit_base_patch16_224", 0), ("vit_base_patch16_clip_224", 0), ("vit_medium_patch16_reg4_gap_256", 0),
    ("eva_large_patch14_196", 0), ("eva02_base_patch14_224", 0), ("beit_base_patch16_224", 0),
    ("vit_small_patch16_dinov3", 0), ("vit_giant_patch14_dinov2", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hooks"), FOLDED)
def test_scales_and_shifts_are_folded_into_every_kind_of_lpm(name: str, hooks: int) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    network = built("ssf", name)
    images = pixels(network.lpm.patch_embed.img_size[0])
    before = {key: value.clone() for key, value in network.lpm.state_dict().items()}
    shared = dict(network.lpm.named_parameters())
    with torch.no_grad():
        expected = network.lpm(images)
        network.adaptation.fold(network.lpm)
        found = network.lpm(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert sum(len(module._forward_hooks) for module in network.lpm.modules()) == hooks
    for key, value in shared.items():
        assert torch.equal(value, before[key]), key


PUBLISHED_CHANGE = 0.35
"""Change of the features of a random ViT-B/16 by the published start of SSF, relative to their norm."""


def test_the_published_start_of_scales_changes_the_lpm() -> None:
    shape = {**SHAPE, "depth": 12, "width": 768, "heads": 12, "mlp_width": 3072}
    raw = {"method": "ssf", "classes": 3, "lpm": "vit_base_patch16_224", "first_block": 0, "hidden": None, **shape}
    torch.manual_seed(0)
    network: Any = gradient_method("ssf").build(
        AdaptationSpec.model_validate({**raw, "options": {"published_start": True}})
    )
    batch = Batch(labels=torch.zeros(2), image=torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        found = network.eval().features(batch)
        for value in network.adaptation.parameters():
            value.zero_()
        expected = network.features(batch)
    assert float((found - expected).norm() / expected.norm()) == pytest.approx(PUBLISHED_CHANGE, rel=0.1)


@pytest.mark.parametrize("zeros", [True, False])
def test_an_adapter_of_zeros_learns_its_last_bias_only(zeros: bool) -> None:
    """The published start of VPT's comparator: why `adapter` does not begin with zeros everywhere."""
    network = built("adapter", moved=False, width=4)
    with torch.no_grad():
        network.lpm.head.weight.normal_()
        for layer in network.adaptation.down if zeros else ():
            layer.weight.zero_()
    layers = {name: value for name, value in network.adaptation.named_parameters() if name.endswith("weight")}
    start = {name: value.detach().clone() for name, value in layers.items()}
    optimizer = torch.optim.SGD(network.adaptation.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        network.lpm(pixels()).square().sum().backward()
        optimizer.step()
    assert all(bool((layer.bias != 0).any()) for layer in network.adaptation.up)
    assert all(torch.equal(value, start[name]) for name, value in layers.items()) == zeros


def test_the_mlp_head_is_two_hidden_layers_of_the_class_token() -> None:
    network: Any = gradient_method("mlp-3").build(PooledSpec(method="mlp-3", classes=3, features=16)).double()
    with torch.no_grad():
        for value in network.parameters():
            value.normal_()
    pooled = torch.randn(4, 2, 8, dtype=torch.double)
    found = network(Batch(labels=torch.zeros(4), pooled=pooled))
    (one, two), head = network.hidden, network.head
    hidden = (pooled[:, 0] @ one.weight.T + one.bias).clamp(min=0)
    expected = (hidden @ two.weight.T + two.bias).clamp(min=0) @ head.weight.T + head.bias
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_mlp_head_is_trained_from_the_store_without_the_lpm(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="mlp-3", train={"lr": 1e-2, "epochs": 3})
    receipt = study.extract()
    result = train(study.settings, study.files(receipt), tmp_path / "model", tmp_path / "checkpoints")
    assert result.learnable == 2 * (64 * 64 + 64) + 64 * 3 + 3
    assert result.epochs[-1].val_loss < result.epochs[0].val_loss
    evaluated, predicted = evaluated_and_predicted(study, receipt)
    np.testing.assert_allclose(predicted, evaluated, atol=1e-4)
