"""The CPU's own order of operations gives what torch's gives, and so do its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stages.methods import kernels

BATCH, TOKENS, HEADS, HEAD_DIM = 5, 11, 3, 4

Inputs = tuple[torch.Tensor, ...]


def both_ways(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[[], torch.Tensor], inputs: Inputs
) -> list[list[torch.Tensor]]:
    """Result and gradients of `inputs`, of the CPU's way and of torch's."""
    found = []
    for on_cpu in (True, False):
        monkeypatch.setattr(kernels, "_on_cpu", lambda _, on_cpu=on_cpu: on_cpu)
        result = compute()
        upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        found.append([result, *torch.autograd.grad(result, inputs, upstream)])
    return found


@pytest.mark.parametrize("kept", [TOKENS, 7, 1])
@pytest.mark.parametrize("images", [1, 2, 8])
def test_self_attention(monkeypatch: pytest.MonkeyPatch, kept: int, images: int) -> None:
    monkeypatch.setattr(kernels, "WEIGHTS", images * HEADS * kept * TOKENS)
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, TOKENS, 3 * HEADS * HEAD_DIM, requires_grad=True)
    own, expected = both_ways(monkeypatch, lambda: kernels.self_attention(qkv, HEADS, kept), (qkv,))
    assert own[0].shape == (BATCH, kept, HEADS * HEAD_DIM)
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_linear(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 20), torch.randn(BATCH, tokens, 6, requires_grad=True)
    inputs = x, layer.weight, layer.bias
    own, expected = both_ways(monkeypatch, lambda: kernels.linear(layer, x), inputs)
    assert own[0].is_contiguous()
    torch.testing.assert_close(own, expected)


def test_half_precision_and_autocast_are_left_to_torch() -> None:
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels._on_cpu(x)
    assert not kernels._on_cpu(x.bfloat16())
    assert not kernels._on_cpu(x.to("meta"))
