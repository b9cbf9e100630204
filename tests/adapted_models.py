"""Tiny LPMs of every family for adaptations, and a ViT written from its equations."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from schemas.specs import AdaptationSpec


def load_families() -> Any:
    """The module of the tests of attention, with a tiny model of every family."""
    path = Path(__file__).parent / "stages/lpm/test_attention.py"
    spec = importlib.util.spec_from_file_location("attention_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def spec_of(model: Any, method: str, **options: Any) -> AdaptationSpec:
    """The spec of an adaptation of all blocks of a model."""
    return AdaptationSpec(
        method=method, classes=3, lpm="", image_size=model.patch_embed.img_size[0], depth=len(model.blocks),
        first_block=0, hidden=None, width=model.embed_dim, heads=model.blocks[0].attn.num_heads, mlp_width=0,
        patch=model.patch_embed.patch_size[0], prefix_tokens=model.num_prefix_tokens, options=options,
    )  # fmt: skip


def tiny_vit(**options: Any) -> Any:
    """A plain pre-norm ViT in float64 with a class token, LayerScale and random weights: D = 48, H = 3, N = 17."""
    torch.manual_seed(0)
    shape = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3, "init_values": 0.3}
    model = timm.create_model("vit_base_patch16_224", pretrained=False, **{**shape, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + 0.05)
    return model.double()


def pixels(count: int = 2) -> torch.Tensor:
    """Random images for `tiny_vit`."""
    return torch.randn(count, 3, 64, 64, dtype=torch.double, generator=torch.manual_seed(1))


def written_out(
    model: Any,
    images: torch.Tensor,
    deep: Sequence[torch.Tensor] | None = None,
    shallow: torch.Tensor | None = None,
    keys: Sequence[torch.Tensor] | None = None,
    values: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits of a ViT from its equations: prompts `deep` (m, D) as tokens of each block, dropped behind it; `shallow`
    (m, D) as tokens that stay; `keys` and `values` (H, m, d) in front of those of each block."""
    count, heads, width = len(images), model.blocks[0].attn.num_heads, model.embed_dim
    x = torch.cat([model.cls_token.expand(count, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    if shallow is not None:
        x = torch.cat([x[:, :1], shallow.expand(count, -1, -1), x[:, 1:]], dim=1)
    for number, block in enumerate(model.blocks):
        own = 0 if deep is None else len(deep[number])
        if deep is not None:
            x = torch.cat([x[:, :1], deep[number].expand(count, -1, -1), x[:, 1:]], dim=1)
        z = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
        projected = z @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
        if keys is not None and values is not None:
            k = torch.cat([keys[number].expand(count, -1, -1, -1), k], dim=2)
            v = torch.cat([values[number].expand(count, -1, -1, -1), v], dim=2)
        o = (q @ k.mT / (width / heads) ** 0.5).softmax(dim=-1) @ v
        u = x + block.ls1.gamma * (o.transpose(1, 2).flatten(2) @ block.attn.proj.weight.T + block.attn.proj.bias)
        z = F.layer_norm(u, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
        x = u + block.ls2.gamma * block.mlp(z)
        x = torch.cat([x[:, :1], x[:, 1 + own :]], dim=1)
    return model.head(F.layer_norm(x[:, 0], (width,), model.norm.weight, model.norm.bias, 1e-6))  # type: ignore[no-any-return]


def assert_same_with_gradients(
    found: torch.Tensor, expected: torch.Tensor, mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> None:
    """Compare outputs and the gradients of the same loss for two sets of leaves, float64, to 1e-10 of their size."""
    assert found.dtype == torch.double
    weight = torch.randn(found.shape, dtype=torch.double, generator=torch.manual_seed(2))
    left = torch.autograd.grad((found * weight).sum(), list(mine))
    right = torch.autograd.grad((expected * weight).sum(), list(other))
    for one, two in zip([found, *left], [expected, *right], strict=True):
        assert float(two.detach().abs().max()) > 1e-6  # a comparison with zeros would prove nothing
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10 * float(two.detach().abs().max()))
