"""Token importance and selection (arXiv 2403.07576, section 2.4 "Important tokens selection").

    global       s[h, j] = mean over all queries i of softmax_j(q_i . k_j / sqrt(d))
    class_token  s[h, j] = softmax_j(q_cls . k_j / sqrt(d))

Kept, per head: the T tokens of highest s, in descending order. The class token may be among them.
"""

from __future__ import annotations

import torch

from schemas.settings import Importance

QUERY_CHUNK = 128
"""Queries per step: bounds the workspace to (B, H, 128, N) instead of (B, H, N, N)."""


def token_importance(query: torch.Tensor, key: torch.Tensor, rule: Importance) -> torch.Tensor:
    """Attention that each token receives.

    Args:
        query: (B, H, N, d), after the model's own normalisation; token 0 is the class token for "class_token".
        key: (B, H, N, d).
        rule: "global" or "class_token".

    Returns:
        (B, H, N), each row summing to 1; at least float32.
    """
    count, head_dim = query.shape[-2:]
    scaled = query * head_dim**-0.5
    transposed = key.transpose(-2, -1)
    kind = torch.promote_types(query.dtype, torch.float32)
    if rule == "class_token":
        return torch.softmax((scaled[..., :1, :] @ transposed).squeeze(-2), dim=-1, dtype=kind)
    received = torch.zeros(key.shape[:-1], dtype=kind, device=key.device)
    for start in range(0, count, QUERY_CHUNK):
        scores = scaled[..., start : start + QUERY_CHUNK, :] @ transposed
        received += torch.softmax(scores, dim=-1, dtype=kind).sum(dim=-2)
    return received / count


def select_tokens(importance: torch.Tensor, kept: int) -> torch.Tensor:
    """Indices of the most important tokens per head.

    Args:
        importance: (B, H, N).
        kept: T, at most N.

    Returns:
        (B, H, T) int64, importance descending; equal importance in order of the tokens, so that every
        device and thread count selects the same.
    """
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices
    return order[..., :kept]


def gather_tokens(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, H, N, d) and (B, H, T) -> (B, H, T, d)."""
    return tokens.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))
