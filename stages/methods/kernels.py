"""Linear layers and self-attention of a small network in the operations that a CPU is quickest at.

Where tensors are not plain float32 on a CPU, or torch traces, they are torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WEIGHTS = 2**18
"""Attention weights that are in use at a time: with what else the step needs they fit the second cache of a core."""


def linear(layer: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, in) -> (B, N, out).

    The same product as a convolution of one pixel: torch leaves products to MKL, which uses AVX-512 on processors of
    Intel only, and convolutions to oneDNN, which uses it wherever it is.
    """
    if not _on_cpu(tokens):
        return cast("torch.Tensor", layer(tokens))
    # Channels come last in memory on both sides, so that nothing is copied.
    image = tokens.unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(image, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1).squeeze(2)


def self_attention(qkv: torch.Tensor, heads: int, kept: int) -> torch.Tensor:
    """Multi-head attention of the first tokens to all.

    Args:
        qkv: (B, N, 3 * H * d): queries, keys, values.
        heads: H.
        kept: Tokens that attend.

    Returns:
        (B, kept, H * d).
    """
    if _on_cpu(qkv):
        return cast("torch.Tensor", _SelfAttention.apply(qkv, heads, kept))
    query, key, value = _thirds(qkv, heads)
    return F.scaled_dot_product_attention(query[:, :, :kept], key, value).transpose(1, 2).flatten(2)


def _on_cpu(tensor: torch.Tensor) -> bool:
    return (
        # First: what follows would break the graph.
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _has_libraries()
    )


@cache
def _has_libraries() -> bool:
    """Whether torch is built with MKL and oneDNN, whose strengths this follows."""
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    return bool(mkl.is_available() and onednn.is_available())  # type: ignore[no-untyped-call]


class _SelfAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v, a few images at a time, the weights computed again for the backward pass.

    Heads are narrow, and MKL is three times as slow at a product with few columns as at the same product with few rows:
    what has the width of a head is computed transposed.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int, kept: int) -> torch.Tensor:
        """(B, N, 3 * H * d) -> (B, kept, H * d)."""
        out = qkv.new_empty(len(qkv), kept, qkv.shape[2] // 3)
        for part in _parts(qkv, heads, kept):
            query, key, value = _split(qkv[part], heads, kept)
            weights = _weights(query, key)
            _joined(out[part], heads).copy_(value.mT @ weights.mT)
        ctx.save_for_backward(qkv, out)
        ctx.heads, ctx.kept = heads, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of `qkv`: dv = A^T dO, dS = A (dO v^T - dO . O), dq = dS k, dk = dS^T q."""
        qkv, out = ctx.saved_tensors
        heads, kept = ctx.heads, ctx.kept
        total = torch.empty_like(qkv)
        total[:, kept:, : out.shape[2]] = 0
        for part in _parts(qkv, heads, kept):
            query, key, value = _split(qkv[part], heads, kept)
            weights = _weights(query, key)
            grad = _joined(grads[0][part], heads).mT.contiguous()
            own = _joined(grads[0][part] * out[part], heads).sum(dim=2).unsqueeze(-1)
            of_query, of_key, of_value = (_joined(third, heads) for third in total[part].chunk(3, dim=2))
            of_value.copy_(grad.mT @ weights)
            inner = (grad @ value.mT).sub_(own).mul_(weights)
            of_query[..., :kept].copy_((key.mT @ inner.mT).mul_(key.shape[-1] ** -0.5))
            of_key.copy_(query.mT @ inner)
        return total, None, None


def _parts(qkv: torch.Tensor, heads: int, kept: int) -> Iterator[slice]:
    step = max(1, WEIGHTS // (heads * kept * qkv.shape[1]))
    return (slice(start, start + step) for start in range(0, len(qkv), step))


def _split(qkv: torch.Tensor, heads: int, kept: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(b, N, 3 * H * d) -> scaled queries (b, H, kept, d), keys and values (b, H, N, d), each contiguous."""
    query, key, value = _thirds(qkv, heads)
    scaled = query[:, :, :kept].clone(memory_format=torch.contiguous_format).mul_(query.shape[-1] ** -0.5)
    return scaled, key.contiguous(), value.contiguous()


def _thirds(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """View of (B, N, 3 * H * d) as (3, B, H, N, d)."""
    batch, count, width = qkv.shape
    return qkv.view(batch, count, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T), (b, H, kept, N), in the memory of the scores."""
    scores = query @ key.mT
    return torch.softmax(scores, dim=-1, out=scores)


def _joined(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """View of (b, N, H * d) as (b, H, d, N)."""
    batch, count, width = tokens.shape
    return tokens.view(batch, count, heads, width // heads).permute(0, 2, 3, 1)
