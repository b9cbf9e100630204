"""Fusion: learnable prompts attend to the cached keys and values of the LPM.

FPT (arXiv 2403.07576, section 2.3): the prompts p_l have the side network's width r = D/8.

    prompt for side block l = dropout(Wo context(Wq p_l) + p_l)        Wq: r -> D, Wo: D -> r

FPT+ (arXiv 2408.02426): the prompts have the LPM's width D and are their own queries.

    prompt for side block l = dropout(Wo (context(LayerNorm(p_l)) + p_l))

    context(q) = per head, softmax(q . k / sqrt(d)) v over the cached tokens, heads concatenated

Wq, Wo and LayerNorm are shared by all layers.
"""

from __future__ import annotations

import torch
from torch import nn

from schemas.results import SideNetworkSpec


def context(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Cross-attention of prompts to cached tokens.

    Args:
        query: (P, D), the same for every image of the batch.
        keys: (B, H, T, d) in any float type; D = H * d.
        values: (B, H, T, d).

    Returns:
        (B, P, D) in the type of `query`.
    """
    batch, heads, _, head_dim = keys.shape
    # The query carries no batch axis: the scale and the head split are applied once, not per image.
    split = (query * head_dim**-0.5).view(-1, heads, head_dim).transpose(0, 1)
    weights = torch.softmax(split @ keys.to(query.dtype).mT, dim=-1)
    mixed = weights @ values.to(query.dtype)
    return mixed.transpose(1, 2).reshape(batch, -1, heads * head_dim)


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
