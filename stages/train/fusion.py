"""Fusion: learnable prompts attend to the cached keys and values of the LPM.

FPT (arXiv 2403.07576, section 2.3): the prompts p_l have the side network's width r = D/8.

    prompt for side block l = dropout(Wo context(Wq p_l) + p_l)        Wq: r -> D, Wo: D -> r

FPT+ (arXiv 2408.02426): the prompts have the LPM's width D and are their own queries.

    prompt for side block l = dropout(Wo (context(LayerNorm(p_l)) + p_l))

    context(q) = per head, softmax(q . k / sqrt(d)) v over the cached tokens, heads concatenated

Wq, Wo and LayerNorm are shared by all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from schemas.results import SideNetworkSpec

CHUNK = 4
"""Images whose keys and values are widened to the type of the query at a time: bounds memory, and fits the caches."""


def context(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Cross-attention of prompts to cached tokens.

    Args:
        query: (P, D), the same for every image of the batch.
        keys: (B, H, T, d) in any float type; D = H * d. A constant: no gradient is computed for it.
        values: (B, H, T, d). A constant too.

    Returns:
        (B, P, D) in the type of `query`.
    """
    _, heads, _, head_dim = keys.shape
    # The query carries no batch axis: the scale and the head split are applied once, not per image.
    split = (query * head_dim**-0.5).view(-1, heads, head_dim).transpose(0, 1)
    return cast("torch.Tensor", _Attend.apply(split, keys, values)).flatten(2)


class _Attend(torch.autograd.Function):
    """softmax(q k^T) v that keeps nothing for the backward pass but its inputs, keys and values as they are stored.

    Plain operations would keep a widened copy of both and the attention weights, for gradients of which all but that
    of the query are thrown away.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(H, P, d), (B, H, T, d), (B, H, T, d) -> (B, P, H, d)."""
        ctx.save_for_backward(query, keys, values)
        heads, count, head_dim = query.shape
        mixed = query.new_empty(len(keys), count, heads, head_dim)
        for out, k, v in _chunks(mixed, keys, values):
            weights = torch.softmax(query @ k.to(query.dtype).mT, dim=-1)
            out.copy_((weights @ v.to(query.dtype)).transpose(1, 2))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the query: dS = A (dA - sum_j A dA), dq = dS k, with A = softmax(q k^T) and dA = dO v^T."""
        query, keys, values = ctx.saved_tensors
        total = torch.zeros_like(query)
        for grad, k, v in _chunks(grads[0], keys, values):
            wide = k.to(query.dtype)
            weights = torch.softmax(query @ wide.mT, dim=-1)
            inner = grad.transpose(1, 2) @ v.to(query.dtype).mT
            inner -= (inner * weights).sum(dim=-1, keepdim=True)
            total += (inner.mul_(weights) @ wide).sum(dim=0)
        return total, None, None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few images of each (B, ...), as views."""
    return zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True)


class Fusion(nn.Module):
    """Prompts of all tapped layers and the projections they share."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.wide = spec.method == "fpt+"
        prompt_width = spec.lpm_width if self.wide else spec.width
        self.prompts = nn.Parameter(torch.empty(spec.layers, spec.prompts, prompt_width))
        self.query: nn.Module
        if self.wide:
            self.query = nn.LayerNorm(spec.lpm_width)
        else:
            self.query = nn.Linear(spec.width, spec.lpm_width)
        self.out = nn.Linear(spec.lpm_width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)
        nn.init.normal_(self.prompts, std=1e-6)

    def forward(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Prompts for side block `layer`.

        Args:
            layer: Position among the tapped layers, from 0.
            keys: (B, H, T, d) of that layer.
            values: (B, H, T, d) of that layer.

        Returns:
            (B, P, width of the side network).
        """
        prompts = self.prompts[layer]
        mixed = context(self.query(prompts), keys, values)
        fused = self.out(mixed + prompts) if self.wide else self.out(mixed) + prompts
        dropped: torch.Tensor = self.dropout(fused)
        return dropped
