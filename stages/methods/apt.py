"""Approximated Prompt Tuning (arXiv 2306.15706): what prompts would add to an attention, without a softmax.

With z the input of an attention, y its output and M prompts T (M, D):

    a = relu(z (T + T W_1^T W_2^T)^T)            (B, N, M)
    y' = exp(s) (y + w a T)                      w = max_M a, without gradient

An exact split of the softmax (identity 6) has a gate in place of w and a softmax in place of the ReLU. Learnable are T,
W_1 (r, D), W_2 (D, r) and the scalar s of each block; T and W_1 start at random, W_2 and s at 0, so that a model does
not start as the LPM. `zero_gate` multiplies w a T by a learnable scalar, 0 at first: then it does, but that is not
published. Here y' precedes LayerScale, as the published code changes the output of the projection. The published head
has ten times the learning rate; here it has that of the prompts.

The published code is for vision-language models; results of an image classifier are UNVERIFIED. What is added grows as
the square of the prompts, because w does, too: gradients should be clipped, as `train.clip_norm` does.
"""

from __future__ import annotations

import torch
from torch import nn

from schemas.cross_adaptations import AptSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation
from stages.methods.adapted_lpm import AdaptationMethod

INITIAL = 0.02
"""Standard deviation of the initial prompts, as published."""


class ApproximatedPrompts(Adaptation):
    """Prompts that are added to the output of every attention."""

    def __init__(self, spec: AdaptationSpec, options: AptSettings) -> None:
        super().__init__(spec.first_block)
        blocks, width, rank = spec.blocks, spec.width, options.latent
        self.prompts = nn.Parameter(INITIAL * torch.randn(blocks, options.prompts, width))
        self.down = nn.Parameter(torch.randn(blocks, rank, width))
        self.up = nn.Parameter(torch.zeros(blocks, width, rank))
        self.log_scale = nn.Parameter(torch.zeros(blocks))
        self.gate = nn.Parameter(torch.zeros(blocks)) if options.zero_gate else None

    def attention_out(self, number: int, output: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Return exp(s) (y + w a T), (B, N, D)."""
        row = self.row(number)
        prompts = self.prompts[row]
        keys = prompts + prompts @ self.down[row].T @ self.up[row].T
        active = (normed @ keys.T).relu()
        weight = active.amax(dim=-1, keepdim=True).detach()
        added = (weight * active) @ prompts
        if self.gate is not None:
            added = self.gate[row] * added
        return self.log_scale[row].exp() * (output + added)


METHOD = AdaptationMethod(ApproximatedPrompts)
