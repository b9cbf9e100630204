"""Fusion: learnable prompts attend to the cached keys and values of the LPM.

FPT (arXiv 2403.07576, section 2.3): the prompts p_l have the side network's width r = D/8.

    prompt for side block l = dropout(Wo context(Wq p_l) + p_l)        Wq: r -> D, Wo: D -> r

FPT+ (arXiv 2408.02426): the prompts have the LPM's width D and are their own queries.

    prompt for side block l = dropout(Wo (context(LayerNorm(p_l)) + p_l))

    context(q) = per head, softmax(q . k / sqrt(d)) v over the cached tokens, heads concatenated

Wq, Wo and LayerNorm are shared by all layers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from schemas.specs import SideNetworkSpec
from stages.methods.batch_draws import BatchDraws
from stages.methods.cached_tokens import CachedTokens
from stages.methods.kernels import linear


def context(query: torch.Tensor, cached: CachedTokens, keep: bool = False) -> torch.Tensor:
    """Compute the cross-attention of prompts to cached tokens.

    Args:
        query: Queries (P, D), the same for every image of the batch.
        cached: Tokens of one layer, D = H * d; they get no gradient.
        keep: Store the attention weights (B, H, P, T) of quantised tokens for the backward pass, where they take less
            memory than quantisation saves; otherwise they are recomputed.

    Returns:
        (B, P, D) in the type of `query`.
    """
    heads = cached.keys.shape[1]
    head_dim = query.shape[1] // heads
    # The query has no batch axis, so that scaling and head split are applied once instead of per image.
    split = (query * head_dim**-0.5).view(-1, heads, head_dim).transpose(0, 1).to(_attention_dtype(query))
    tensors = cached.keys, cached.values, cached.scale, cached.offset
    return cast("torch.Tensor", _Attend.apply(split, keep and cached.scale is not None, *tensors)).flatten(2)


def _attention_dtype(query: torch.Tensor) -> torch.dtype:
    """Return the autocast type if autocast is on, since it does not apply inside a custom autograd function."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


class _Attend(torch.autograd.Function):
    """A v with A = softmax(q k^T), which saves keys and values as stored, and optionally A, for the backward pass.

    Composed operations would save dequantised copies of both, although only the query needs a gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, keep: bool, *cached: Any) -> torch.Tensor:
        """Compute (B, P, H, d) from queries (H, P, d), and keys, values, scale and offset of `CachedTokens`."""
        heads, count, head_dim = query.shape
        mixed = query.new_empty(len(cached[0]), count, heads, head_dim)
        saved_weights = []
        # All operands already have the type of the query; the backward pass runs without autocast as well.
        with torch.autocast(query.device.type, enabled=False):
            for chunk, tokens in CachedTokens(*cached).chunks(query):
                weights = torch.softmax(tokens.scores(query, tokens.wide_keys()), dim=-1)
                mixed[chunk].copy_(tokens.mix(weights).transpose(1, 2))
                saved_weights += [weights] if keep else []
        ctx.save_for_backward(query, *cached, *saved_weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradient of the query: dS = A (dA - sum_j A dA), dq = dS k, with dA = dO v^T.

        Offsets cancel: dO . o is the same for every token, and each row of dS sums to 0.
        """
        query, keys, values, scale, offset, *saved_weights = ctx.saved_tensors
        grad_query = torch.zeros_like(query)
        for number, (chunk, tokens) in enumerate(CachedTokens(keys, values, scale, offset).chunks(query)):
            grad_scores = tokens.unmix(grads[0][chunk].transpose(1, 2))
            wide_keys = tokens.wide_keys()
            weights = saved_weights[number] if saved_weights else tokens.scores(query, wide_keys).softmax(dim=-1)
            grad_scores -= (grad_scores * weights).sum(dim=-1, keepdim=True)
            grad_query += tokens.unscore(grad_scores.mul_(weights), wide_keys).sum(dim=0)
        return grad_query, None, None, None, None, None


class PromptDropout(BatchDraws, nn.Module):
    """Dropout with an optional generator per network, so that networks trained together draw independent masks."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def draw(self, like: torch.Tensor, width: int) -> torch.Tensor | None:
        """Draw the dropout mask of the prompts of one block.

        Separate from its application, so that activation checkpointing can recompute the latter.

        Args:
            like: Tensor (B, P, ...) with the number of images and prompts, and the device.
            width: Width of the prompts.

        Returns:
            Mask (B, P, width), True with probability 1 - p; None in evaluation.
        """
        if not self.training or not self.p:
            return None
        rows, batch_rows = self.part_of(len(like))
        mask = torch.empty(batch_rows, like.shape[1], width, device=like.device)
        return mask.bernoulli_(1 - self.p, generator=self.generator)[rows].bool()

    def apply_drawn(self, prompts: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Apply a mask to (B, P, width), and scale by 1 / (1 - p)."""
        return prompts if kept is None else prompts * kept.float().div_(1 - self.p)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """Draw and apply a mask."""
        return self.apply_drawn(prompts, self.draw(prompts, prompts.shape[-1]))

    def _state(self) -> torch.Tensor | None:
        return None if self.generator is None else self.generator.get_state()

    def _restore(self, state: torch.Tensor) -> None:
        if self.generator is not None:
            self.generator.set_state(state)


class Fusion(nn.Module):
    """Prompts of all tapped layers, and the projections that they share."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.wide = spec.wide_prompts
        prompt_width = spec.lpm_width if self.wide else spec.width
        self.prompts = nn.Parameter(torch.empty(spec.layers, spec.prompts, prompt_width))
        self.query: nn.Module
        if self.wide:
            self.query = nn.LayerNorm(spec.lpm_width)
        else:
            self.query = nn.Linear(spec.width, spec.lpm_width)
        self.out = nn.Linear(spec.lpm_width, spec.width)
        self.dropout = PromptDropout(spec.dropout)
        nn.init.normal_(self.prompts, std=1e-6)

    def queries(self, layer: int) -> torch.Tensor:
        """Compute the queries (P, D) of a layer, counted from 0, for its cached tokens."""
        queries: torch.Tensor = self.query(self.prompts[layer])
        return queries

    def gathered(self, layer: int, mixed: torch.Tensor) -> torch.Tensor:
        """Return the input (B, P, D) of Wo, given the `context` of the queries as `mixed`."""
        return mixed + self.prompts[layer] if self.wide else mixed

    def prompts_from(self, layer: int, gathered: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Compute the prompts of a side block.

        Args:
            layer: Position among the tapped layers, from 0.
            gathered: Input of Wo for this layer, (B, P, D).
            kept: Dropout mask from `draw_kept`.

        Returns:
            Prompts (B, P, width of the side network).
        """
        fused = linear(self.out, gathered)
        return self.dropout.apply_drawn(fused if self.wide else fused + self.prompts[layer], kept)

    def draw_kept(self, gathered: torch.Tensor) -> torch.Tensor | None:
        """Draw the dropout mask of the prompts of one side block."""
        return self.dropout.draw(gathered, self.out.out_features)
