"""Linear layers and self-attention of a small network, with the operations that are fastest on a CPU.

Other devices, types other than float32, and torch.compile use torch's implementation.
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
"""Attention weights that are computed at a time, so that the working set fits the L2 cache of a core."""


def linear(layer: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer, (B, N, in) -> (B, N, out).

    It is computed as a 1x1 convolution: torch delegates matrix products to MKL, which uses AVX-512 only on Intel
    processors, and convolutions to oneDNN, which uses it wherever it is available.
    """
    if not _on_cpu(tokens):
        return cast("torch.Tensor", layer(tokens))
    # Channels are last in memory before and after, so that nothing is copied.
    image = tokens.unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(image, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1).squeeze(2)


def self_attention(qkv: torch.Tensor, heads: int, kept: int) -> torch.Tensor:
    """Compute multi-head attention of the first tokens to all tokens.

    Args:
        qkv: Queries, keys and values, (B, N, 3 * H * d).
        heads: H.
        kept: Number of tokens that attend.

    Returns:
        (B, kept, H * d).
    """
    if _on_cpu(qkv):
        return cast("torch.Tensor", _SelfAttention.apply(qkv, heads, kept))
    query, key, value = _thirds(qkv, heads)
    return F.scaled_dot_product_attention(query[:, :, :kept], key, value).transpose(1, 2).flatten(2)


def _on_cpu(tensor: torch.Tensor) -> bool:
    return (
        # Checked first, because the other conditions would break the graph.
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _has_libraries()
    )


@cache
def _has_libraries() -> bool:
    """Return whether torch is built with MKL and oneDNN, for which these operations were chosen."""
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    return bool(mkl.is_available() and onednn.is_available())  # type: ignore[no-untyped-call]


class _SelfAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v, a few images at a time; the backward pass recomputes the attention weights.

    Heads are narrow, and MKL is three times slower for a product with few columns than for one with few rows, so that
    products with the width of a head are computed transposed.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int, kept: int) -> torch.Tensor:
        """Compute (B, N, 3 * H * d) -> (B, kept, H * d)."""
        out = qkv.new_empty(len(qkv), kept, qkv.shape[2] // 3)
        for chunk in _chunks(qkv, heads, kept):
            query, key, value = _split(qkv[chunk], heads, kept)
            weights = _weights(query, key)
            _joined(out[chunk], heads).copy_(value.mT @ weights.mT)
        ctx.save_for_backward(qkv, out)
        ctx.heads, ctx.kept = heads, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Compute the gradient of `qkv`: dv = A^T dO, dS = A (dO v^T - dO . O), dq = dS k, dk = dS^T q."""
        qkv, out = ctx.saved_tensors
        heads, kept = ctx.heads, ctx.kept
        grad_qkv = torch.empty_like(qkv)
        grad_qkv[:, kept:, : out.shape[2]] = 0
        for chunk in _chunks(qkv, heads, kept):
            query, key, value = _split(qkv[chunk], heads, kept)
            weights = _weights(query, key)
            grad_out = _joined(grads[0][chunk], heads).mT.contiguous()
            row_sums = _joined(grads[0][chunk] * out[chunk], heads).sum(dim=2).unsqueeze(-1)
            grad_query, grad_key, grad_value = (_joined(third, heads) for third in grad_qkv[chunk].chunk(3, dim=2))
            grad_value.copy_(grad_out.mT @ weights)
            grad_scores = (grad_out @ value.mT).sub_(row_sums).mul_(weights)
            grad_query[..., :kept].copy_((key.mT @ grad_scores.mT).mul_(key.shape[-1] ** -0.5))
            grad_key.copy_(query.mT @ grad_scores)
        return grad_qkv, None, None


def _chunks(qkv: torch.Tensor, heads: int, kept: int) -> Iterator[slice]:
    """Return slices of the batch with at most `WEIGHTS` attention weights, or of one image."""
    step = max(1, WEIGHTS // (heads * kept * qkv.shape[1]))
    return (slice(start, start + step) for start in range(0, len(qkv), step))


def _split(qkv: torch.Tensor, heads: int, kept: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split (b, N, 3 * H * d) into scaled queries (b, H, kept, d), keys and values (b, H, N, d), each contiguous."""
    query, key, value = _thirds(qkv, heads)
    scaled = query[:, :, :kept].clone(memory_format=torch.contiguous_format).mul_(query.shape[-1] ** -0.5)
    return scaled, key.contiguous(), value.contiguous()


def _thirds(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a view of (B, N, 3 * H * d) as (3, B, H, N, d)."""
    batch, count, width = qkv.shape
    return qkv.view(batch, count, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Compute softmax(q k^T), (b, H, kept, N), in the memory of the scores."""
    scores = query @ key.mT
    return torch.softmax(scores, dim=-1, out=scores)


def _joined(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a view of (b, N, H * d) as (b, H, d, N)."""
    batch, count, width = tokens.shape
    return tokens.view(batch, count, heads, width // heads).permute(0, 2, 3, 1)
