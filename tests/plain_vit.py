"""A plain ViT in a few lines, around blocks that a test writes from the equations of a paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from schemas.features import LpmInfo
from schemas.methods import METHODS
from schemas.specs import AdaptationSpec
from stages.lpm.loading import describe_lpm
from stages.methods.base import gradient_method

TINY = "test_vit"
"""6 blocks of width 64 with 2 heads of 32."""


def adapted(method: str, size: int = 64, first: int = 0, **options: Any) -> Any:
    """Return a tiny LPM with an adaptation, float64; every number that starts at 0 or 1 is moved from it."""
    info: LpmInfo = describe_lpm(TINY, size)
    section = METHODS[method].options
    assert section is not None
    spec = AdaptationSpec(
        method=method, classes=3, lpm=TINY, image_size=size, depth=info.depth, first_block=first, hidden=None,
        width=info.width, heads=info.heads, mlp_width=info.mlp_width or 0, patch=info.patch,
        prefix_tokens=info.prefix_tokens, options=section(**options).model_dump(mode="json"),
    )  # fmt: skip
    torch.manual_seed(0)
    network: Any = gradient_method(method).build(spec)
    network.double().eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return network


def pixels(size: int = 64) -> torch.Tensor:
    """Return two images."""
    return torch.randn(2, 3, size, size, dtype=torch.double, generator=torch.manual_seed(1))


def heads(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """(..., N, H d) -> (..., H, N, d)."""
    return tokens.unflatten(-1, (count, -1)).transpose(-2, -3)


def split_qkv(attention: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return queries, keys and values (..., H, N, d)."""
    projected = F.linear(tokens, attention.qkv.weight, attention.qkv.bias)
    return [heads(part, attention.num_heads) for part in projected.chunk(3, dim=-1)]


def joined(attention: Any, mixed: torch.Tensor) -> torch.Tensor:
    """(..., H, N, d) -> (..., N, D), projected."""
    return F.linear(mixed.transpose(-2, -3).flatten(-2), attention.proj.weight, attention.proj.bias)


def self_attention(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the output of a plain attention."""
    q, k, v = split_qkv(attention, tokens)
    return joined(attention, (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)


def plain_logits(lpm: Any, images: torch.Tensor, block: Callable[[int, Any, torch.Tensor], torch.Tensor]) -> Any:
    """Return the logits of a ViT whose blocks are those of a function."""
    tokens = lpm._pos_embed(lpm.patch_embed(images))
    for number, module in enumerate(lpm.blocks):
        tokens = block(number, module, tokens)
    return lpm.head(lpm.norm(tokens)[:, 0])


def assert_equal(network: Any, block: Callable[[int, Any, torch.Tensor], torch.Tensor], size: int = 64) -> None:
    """Compare the logits of an adapted LPM and all gradients with those of blocks that a test wrote out."""
    images = pixels(size)
    learnt: Mapping[str, torch.Tensor] = {name: v for name, v in network.named_parameters() if v.requires_grad}
    results = []
    for logits in (network.lpm(images), plain_logits(network.lpm, images, block)):
        loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.double).view_as(logits)).sum()
        results.append((logits, torch.autograd.grad(loss, list(learnt.values()))))
    (found, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for name, mine, other in zip(learnt, gradients, expected_gradients, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10 * max(1.0, float(other.abs().max())), msg=name)
