"""Embedded Prompt Tuning (arXiv 2407.01003): prompt logits that take part in every softmax and have no value.

As published, d_p learnable logits P_i stand in front of the attention logits of token i, shared by heads and images:

    attention_i = softmax([P_i, q_i k^T / sqrt(d)])[d_p:] v

Only s_i = logsumexp_j P_ij enters the result, which is that of fused attention times sigmoid(lse_i - s_i) (METHODS I1).
`ept-lse` learns s_i directly, as a sink of fused attention: one number per token and block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from schemas.prompt_adaptations import EptSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation
from stages.lpm.attention import Projected
from stages.methods.adapted_lpm import AdaptationMethod

INITIAL = 0.02
"""Standard deviation of the initial prompt logits, as published."""


class EmbeddedPrompts(Adaptation):
    """EPT as published, with the matrix of all attention weights."""

    def __init__(self, spec: AdaptationSpec, options: EptSettings) -> None:
        super().__init__(spec.first_block)
        self.prompts = nn.Parameter(INITIAL * torch.randn(spec.blocks, spec.tokens, options.prompts))

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor:
        """Return softmax([P, scores])[:, d_p:] v, (B, H, N, d)."""
        scores = (tokens.query * scale) @ tokens.key.mT
        if tokens.bias is not None:
            scores = scores + tokens.bias
        prompts = self.prompts[self.row(number)].to(scores.dtype)
        logits = torch.cat([prompts.expand(*scores.shape[:2], -1, -1), scores], dim=-1)
        return logits.softmax(dim=-1)[..., prompts.shape[-1] :] @ tokens.value

    def logits(self) -> torch.Tensor:
        """Return s, (blocks, N)."""
        return self.prompts.logsumexp(dim=-1)


class EmbeddedLogits(Adaptation):
    """EPT with s = log d_p + u, and u learnable from 0 (METHODS I4)."""

    def __init__(self, spec: AdaptationSpec, options: EptSettings) -> None:
        super().__init__(spec.first_block)
        self.base = math.log(options.prompts)
        self.offsets = nn.Parameter(torch.zeros(spec.blocks, spec.tokens))

    def sink(self, number: int) -> torch.Tensor:
        """Return the logits s of a block, (N,)."""
        return self.base + self.offsets[self.row(number)]

    def logits(self) -> torch.Tensor:
        """Return s, (blocks, N)."""
        return self.base + self.offsets


def at_grid(offsets: torch.Tensor, prefix: int, side: int, new_side: int) -> torch.Tensor:
    """Resample position-bound numbers to another image size, bicubically; those of prefix tokens stay.

    Args:
        offsets: (blocks, prefix + side^2).
        prefix: Class and register tokens.
        side: Patches per side.
        new_side: Patches per side of the result.

    Returns:
        (blocks, prefix + new_side^2).
    """
    grid = offsets[:, prefix:].reshape(len(offsets), 1, side, side)
    resampled = F.interpolate(grid, (new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([offsets[:, :prefix], resampled.flatten(1)], dim=1)


def _make(spec: AdaptationSpec, options: EptSettings) -> Adaptation:
    return EmbeddedPrompts(spec, options) if spec.method == "ept" else EmbeddedLogits(spec, options)


METHOD = AdaptationMethod(_make)
