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
from stages.methods.cached_tokens import CachedTokens
from stages.methods.kernels import linear


def context(query: torch.Tensor, cached: CachedTokens, keep: bool = False) -> torch.Tensor:
    """Cross-attention of prompts to cached tokens.

    Args:
        query: (P, D), the same for every image of the batch.
        cached: One layer, D = H * d. A constant: no gradient is computed for it.
        keep: Keep the attention weights (B, H, P, T) of tokens in codes for the backward pass, where they take less
            than the codes save; else it computes them again.

    Returns:
        (B, P, D) in the type of `query`.
    """
    heads = cached.keys.shape[1]
    head_dim = query.shape[1] // heads
    # The query carries no batch axis: the scale and the head split are applied once, not per image.
    split = (query * head_dim**-0.5).view(-1, heads, head_dim).transpose(0, 1).to(_attention_dtype(query))
    parts = cached.keys, cached.values, cached.scale, cached.offset
    return cast("torch.Tensor", _Attend.apply(split, keep and cached.scale is not None, *parts)).flatten(2)


def _attention_dtype(query: torch.Tensor) -> torch.dtype:
    """Type of autocast where that is on: it reaches no function with a backward pass of its own."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


class _Attend(torch.autograd.Function):
    """A v with A = softmax(q k^T), which keeps its inputs, keys and values as they are stored, and perhaps A.

    Plain operations would keep a widened copy of both, for gradients of which all but that of the query are thrown
    away.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, keep: bool, *cached: Any) -> torch.Tensor:
        """(H, P, d) and keys, values, scale, offset of `CachedTokens` -> (B, P, H, d)."""
        heads, count, head_dim = query.shape
        mixed = query.new_empty(len(cached[0]), count, heads, head_dim)
        kept = []
        # Everything has the type of the query already; the backward pass runs without autocast as well.
        with torch.autocast(query.device.type, enabled=False):
            for part, tokens in CachedTokens(*cached).chunks(query):
                weights = torch.softmax(tokens.scores(query, tokens.wide_keys()), dim=-1)
                mixed[part].copy_(tokens.mix(weights).transpose(1, 2))
                kept += [weights] if keep else []
        ctx.save_for_backward(query, *cached, *kept)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the query: dS = A (dA - sum_j A dA), dq = dS k, with A = softmax(q k^T) and dA = dO v^T.

        Offsets drop out: dO . o is the same for every token, and each row of dS sums to 0.
        """
        query, keys, values, scale, offset, *kept = ctx.saved_tensors
        total = torch.zeros_like(query)
        for number, (part, tokens) in enumerate(CachedTokens(keys, values, scale, offset).chunks(query)):
            inner = tokens.unmix(grads[0][part].transpose(1, 2))
            wide = tokens.wide_keys()
            weights = kept[number] if kept else torch.softmax(tokens.scores(query, wide), dim=-1)
            inner -= (inner * weights).sum(dim=-1, keepdim=True)
            total += tokens.unscore(inner.mul_(weights), wide).sum(dim=0)
        return total, None, None, None, None, None


class PromptDropout(nn.Module):
    """Dropout that can draw from a generator of its own: networks trained side by side draw what each would alone."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None
        self._part: tuple[slice, int] | None = None
        self._before: torch.Tensor | None = None

    def draw(self, like: torch.Tensor, width: int) -> torch.Tensor | None:
        """Which values of the prompts of one block are kept: all but a share p; None in evaluation.

        Drawn apart from what they multiply, so that this can be computed a second time (activation checkpointing).

        Args:
            like: (B, P, ...), of the batch, prompts and device.
            width: Of the prompts.

        Returns:
            (B, P, width) bool, or None.
        """
        if not self.training or not self.p:
            return None
        rows, whole = self._part or (slice(None), len(like))
        drawn = torch.empty(whole, like.shape[1], width, device=like.device)
        return drawn.bernoulli_(1 - self.p, generator=self.generator)[rows].bool()

    def apply_drawn(self, prompts: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """What is kept of (B, P, width), times 1 / (1 - p)."""
        return prompts if kept is None else prompts * kept.float().div_(1 - self.p)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """Draw and apply."""
        return self.apply_drawn(prompts, self.draw(prompts, prompts.shape[-1]))

    def draw_part(self, rows: slice | None, whole: int, again: bool) -> None:
        """From here on draw for some rows of a batch what they would get in the whole of it.

        Args:
            rows: Those; None: the batch is whole.
            whole: Rows of the whole batch.
            again: These are further rows of the batch that was drawn for last.
        """
        self._part = None if rows is None else (rows, whole)
        if self.generator is None or rows is None:
            return
        if again and self._before is not None:
            self.generator.set_state(self._before)
        else:
            self._before = self.generator.get_state()


class Fusion(nn.Module):
    """Prompts of all tapped layers and the projections they share."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.wide = spec.method in ("fpt+", "fpt-x")
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
        """What the prompts of side block `layer` ask the cached tokens, (P, D); layers count from 0."""
        asked: torch.Tensor = self.query(self.prompts[layer])
        return asked

    def gathered(self, layer: int, mixed: torch.Tensor) -> torch.Tensor:
        """What Wo reads, (B, P, D): all that the backward pass needs to know of `context` of `queries`, `mixed`."""
        return mixed + self.prompts[layer] if self.wide else mixed

    def prompts_from(self, layer: int, gathered: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Prompts for side block `layer`.

        Args:
            layer: Position among the tapped layers, from 0.
            gathered: Of this layer, (B, P, D).
            kept: What `draw_kept` gave.

        Returns:
            (B, P, width of the side network).
        """
        fused = linear(self.out, gathered)
        return self.dropout.apply_drawn(fused if self.wide else fused + self.prompts[layer], kept)

    def draw_kept(self, gathered: torch.Tensor) -> torch.Tensor | None:
        """Dropout of the prompts of one side block, for `prompts_from`."""
        return self.dropout.draw(gathered, self.out.out_features)
