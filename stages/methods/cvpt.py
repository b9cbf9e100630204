"""Cross Visual Prompt Tuning (arXiv 2408.14961): between attention and MLP, tokens attend to m prompts of their block.

    u = x + attention(norm1(x))
    u = u + W_o softmax((W_q u + b_q) (W_k P + b_k)^T / sqrt(d)) (W_v P + b_v) + b_o
    x' = u + mlp(norm2(u))

All projections are those of the block's own attention, frozen: the published code has copies of them, which take 28.4
million numbers and never change. As there, neither u nor P is normalised, and LayerScale does not apply to the added
term. `normed` makes the queries of norm1(u), which the projection was trained on; that is an ablation. Prompts have no
position. Left out: the dropout of the prompts (0.1, per image), so that keys and values are computed once per batch.

Without q/k normalisation, gate, or norm behind the attention, the term is that of an adapter whose activation is a
softmax per head (identity 8), as which it is served:

    sum_h softmax(u A_h + a_h) C_h + b_o,  A_h = W_q,h^T K_h^T / sqrt(d),  a_h = b_q,h K_h^T / sqrt(d),  C_h = V_h W_o,h
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from schemas.cross_adaptations import CvptSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, keys_values
from stages.lpm.attention import finish, gate_of, queries, query_projection, scale_of
from stages.methods.adapted_lpm import AdaptationMethod

FOLDED = ("into", "into_bias", "out", "out_bias")
"""Buffers of a folded adaptation: A (blocks, H m, D), a (blocks, H m), C (blocks, H m, D) and b_o (blocks, D)."""


class CrossPrompts(Adaptation):
    """Prompts to which the tokens of a block attend after their own attention."""

    def __init__(self, spec: AdaptationSpec, options: CvptSettings) -> None:
        """Draw prompts as `xavier_uniform_` does for those of all blocks of the LPM."""
        super().__init__(spec.first_block)
        self.heads, self.normed = spec.heads, options.normed
        bound = math.sqrt(6 / ((options.prompts + spec.depth) * spec.width))
        self.prompts = nn.Parameter(torch.empty(spec.blocks, options.prompts, spec.width).uniform_(-bound, bound))
        for name in FOLDED:
            self.register_buffer(name, None, persistent=False)

    def between(self, number: int, block: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Add what the prompts contribute to the tokens (B, N, D)."""
        read = block.norm1(tokens) if self.normed else tokens
        if getattr(self, FOLDED[0]) is not None:
            return tokens + self._folded(self.row(number), read)
        key, value = keys_values(block, self.prompts[self.row(number)], normed=False)
        query = queries(block.attn, read)
        shape = (len(query), -1, -1, -1)
        mixed = F.scaled_dot_product_attention(
            query, key.expand(shape), value.expand(shape), scale=scale_of(block.attn)
        )
        return tokens + finish(block.attn, mixed, gate_of(block.attn, read))

    def _folded(self, row: int, read: torch.Tensor) -> torch.Tensor:
        """Return the term of the prompts as that of an adapter."""
        into, into_bias, out, out_bias = (getattr(self, name)[row] for name in FOLDED)
        logits = F.linear(read, into, into_bias)
        weights = logits.view(*logits.shape[:-1], self.heads, -1).softmax(dim=-1)
        return F.linear(weights.flatten(-2), out.mT, out_bias)

    def fold(self, lpm: Any) -> None:
        """Move prompts and projections into adapters, unless attention is more than projections and a softmax."""
        blocks = list(lpm.blocks)[self.first :]
        if all(_is_plain(block.attn) for block in blocks):
            parts = [_adapter(block, prompts) for block, prompts in zip(blocks, self.prompts, strict=True)]
            for name, values in zip(FOLDED, zip(*parts, strict=True), strict=True):
                self.register_buffer(name, torch.stack(values), persistent=False)


def _is_plain(attention: Any) -> bool:
    """Return whether queries and outputs are linear in tokens and mixed values."""
    steps = (getattr(attention, name, None) for name in ("q_norm", "norm", "gate"))
    return all(step is None or isinstance(step, nn.Identity) for step in steps)


def _adapter(block: Any, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A (H m, D), a (H m,), C (H m, D) and b_o (D,) of a block and its prompts (m, D)."""
    attention = block.attn
    key, value = (part[0] for part in keys_values(block, prompts, normed=False))
    key = key * scale_of(attention)
    weight, bias = query_projection(attention)
    heads, dim = key.shape[0], key.shape[-1]
    into = key @ weight.view(heads, dim, -1)
    shift = into.new_zeros(into.shape[:2]) if bias is None else torch.einsum("hmd,hd->hm", key, bias.view(heads, dim))
    out = torch.einsum("hmd,chd->hmc", value, attention.proj.weight.view(-1, heads, dim))
    final = prompts.new_zeros(prompts.shape[1]) if attention.proj.bias is None else attention.proj.bias
    return into.flatten(0, 1), shift.flatten(), out.flatten(0, 1), final


METHOD = AdaptationMethod(CrossPrompts)
