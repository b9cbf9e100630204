"""What a block's attention does before and after softmax(q k^T) v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values as attention sees them."""

    query: torch.Tensor
    """(B, H, N, d), normalised and rotated where the model does so; not scaled."""
    key: torch.Tensor
    """(B, H, N, d), likewise."""
    value: torch.Tensor
    """(B, H, N, d)."""
    bias: torch.Tensor | None = None
    """Added to the scaled scores, broadcastable to (B, H, N, N); None: nothing is."""


def project(attention: Any, tokens: torch.Tensor, *_args: Any, **_kwargs: Any) -> Projected:
    """(B, N, D) -> what softmax sees; the further arguments are those of the module's own forward pass."""
    batch, count, _ = tokens.shape
    query, key, value = attention.qkv(tokens).view(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return Projected(attention.q_norm(query), attention.k_norm(key), value)


def scale_of(attention: Any) -> float:
    """What multiplies q . k."""
    return float(attention.scale)


def finish(attention: Any, mixed: torch.Tensor) -> torch.Tensor:
    """(B, H, N, d) after softmax(q k^T) v -> (B, N, D), the module's own output."""
    joined = attention.norm(mixed.transpose(1, 2).flatten(2))
    projected: torch.Tensor = attention.proj_drop(attention.proj(joined))
    return projected
