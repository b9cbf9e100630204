"""Token importance and selection (arXiv 2403.07576, section 2.4 "Important tokens selection").

    global       s[h, j] = mean over all queries i of softmax_j(q_i . k_j / sqrt(d))
    class_token  s[h, j] = softmax_j(q_cls . k_j / sqrt(d))

Per head, the T tokens of highest s are selected, in descending order. The class token may be among them.

The matrix of all queries and keys never exists. Fused attention returns the log-sum-exp of each query with its result;
with it the softmax of some queries at a time is one matrix product and one exponential, without a second
normalisation:

    softmax_j(q_i . k_j) = exp(q_i . k_j - lse_i)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from schemas.settings import Importance
from stages.lpm.attention import Projected

QUERY_CHUNK = 256
"""Queries per step: bounds the workspace to (heads, 256, N) instead of (B, H, N, N)."""

CPU_HEADS = 4
"""Heads per step on a CPU: the scores stay in its caches between the product and the exponential. It does not depend on
the number of threads, so that results do not either."""

LSE_ALIGNMENT = 32
"""CUDA's memory-efficient attention pads the log-sum-exp to a multiple of this."""


def attend(tokens: Projected, scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute fused attention, and the log-sum-exp of its scores if the kernel of this device returns it.

    Args:
        tokens: Queries, keys and values of one block.
        scale: Multiplies q . k.

    Returns:
        softmax(q k^T scale + bias) v, (B, H, N, d), and the log-sum-exp, (B, H, N) in float32 or wider, or None.
    """
    query, key, value, bias = tokens.query, tokens.key, tokens.value, tokens.bias
    ops: Any = torch.ops.aten
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        mask = None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2]).to(query.dtype)
        mixed, lse = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)
        return mixed, lse
    # The CUDA kernel needs a multiple of 8 channels per head, and a bias in aligned rows.
    if query.device.type == "cuda" and bias is None and query.shape[-1] % 8 == 0:
        mixed, lse, *_ = ops._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
        count = query.shape[-2]
        return mixed, lse[..., :count] if lse.shape[-1] - count < LSE_ALIGNMENT else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale), None


def token_importance(
    tokens: Projected, scale: float, rule: Importance, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the attention that each token receives.

    Args:
        tokens: Queries, keys and values of one block; token 0 is the class token for "class_token".
        scale: Multiplies q . k.
        rule: "global" or "class_token".
        lse: (B, H, N) from `attend`; None: the softmax is computed in full.

    Returns:
        (B, H, N), each row summing to 1; at least float32.
    """
    batch, heads, count, dim = tokens.query.shape
    query, key = tokens.query.reshape(-1, count, dim), tokens.key.reshape(-1, count, dim)
    if rule == "class_token":
        query, lse = query[:, :1], None if lse is None else lse[..., :1]
    kind = torch.promote_types(query.dtype, torch.float32)
    if lse is not None and tokens.bias is None and kind == query.dtype:
        received = _by_log_sum_exp(query, key, scale, lse.reshape(batch * heads, -1))
    else:
        bias = tokens.bias if tokens.bias is None else tokens.bias.expand(batch, heads, count, count)
        received = _by_softmax(query, key, scale, bias, kind)
    return received.view(batch, heads, count) / query.shape[1]


def _by_log_sum_exp(query: torch.Tensor, key: torch.Tensor, scale: float, lse: torch.Tensor) -> torch.Tensor:
    """(BH, Q, d), (BH, N, d), (BH, Q) -> (BH, 1, N): sums over the queries of exp(q . k scale - lse)."""
    received = torch.zeros(len(key), 1, key.shape[1], dtype=query.dtype, device=query.device)
    step = CPU_HEADS if query.device.type == "cpu" else len(query)
    workspace = query.new_empty(min(step, len(query)), min(QUERY_CHUNK, query.shape[1]), key.shape[1])
    for start in range(0, len(query), step):
        heads = slice(start, start + step)
        # The log-sum-exp is one more channel: the subtraction needs no pass over the scores.
        queries = torch.cat([query[heads] * scale, -lse[heads].unsqueeze(-1).to(query.dtype)], dim=-1)
        keys = torch.cat([key[heads], torch.ones_like(key[heads, :, :1])], dim=-1).transpose(1, 2)
        for chunk in torch.split(queries, QUERY_CHUNK, dim=1):
            space = workspace[: len(chunk)]
            shares = torch.bmm(chunk, keys, out=space) if chunk.shape[1] == space.shape[1] else chunk @ keys
            received[heads] += shares.exp_().sum(dim=1, keepdim=True)
    return received


def _by_softmax(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None, kind: torch.dtype
) -> torch.Tensor:
    """Compute the same as (BH, N) without the log-sum-exp, also for scores of lower precision."""
    received = torch.zeros(len(key), key.shape[1], dtype=kind, device=key.device)
    step = CPU_HEADS if key.device.type == "cpu" else len(key)
    for first in range(0, len(key), step):
        heads = slice(first, first + step)
        keys = key[heads].transpose(1, 2)
        for start in range(0, query.shape[1], QUERY_CHUNK):
            scores = (query[heads, start : start + QUERY_CHUNK] * scale @ keys).to(kind)
            if bias is not None:
                # Head by head: flattened, a bias that all images share would be copied for each of them.
                for head_scores, row in zip(scores, range(first, first + len(scores)), strict=True):
                    head_scores += bias[row // bias.shape[1], row % bias.shape[1], start : start + scores.shape[1]]
            received[heads] += torch.softmax(scores, dim=-1).sum(dim=1)
    return received


def select_tokens(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Select the most important tokens per head.

    Args:
        importance: (B, H, N).
        count: T, at most N.

    Returns:
        (B, H, T) int64, importance descending; equal importance in order of the tokens, so that the selection does not
        depend on the device or the number of threads.
    """
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices
    return order[..., :count]


def gather_tokens(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Select tokens by index: (B, H, N, d) and (B, H, T) -> (B, H, T, d)."""
    return tokens.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))
