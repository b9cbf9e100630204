"""AttnScale (arXiv 2304.01917): learnable factors of the attention of the LPM, from 1.

    attn-scale           softmax(alpha_h q k^T / sqrt(d) + bias) v        one alpha per head and block; fused attention
    attn-scale-matrix    (S * softmax(q k^T / sqrt(d) + bias)) v          S (N, N) per block, shared by heads
    ln-scale             attn-scale and the norms of LN-Tune: the paper's strong baseline for few shots

The abstract has "a set of scaling parameters for each attention matrix"; their granularity is UNVERIFIED, so both
readings are here. That the two parts of the baseline are trained at once is a translation, too.
`attn-scale` has few parameters and fits any resolution. `attn-scale-matrix` needs the matrix of all attention weights
and is bound to the number of tokens: another one is refused. What is stored is the difference from 1, so that weight
decay pulls towards the LPM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from schemas.errors import UnsupportedModelError
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, mix_with
from stages.lpm.attention import Projected
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.tuned_weights import TunedWeights, is_norm


class HeadScale(TunedWeights):
    """A factor per head of the attention logits, and possibly the norms."""

    def __init__(self, spec: AdaptationSpec, norms: bool) -> None:
        """Start with factors of 1.

        Args:
            spec: Shape of the LPM.
            norms: Whether the norms learn, too.
        """
        super().__init__(spec, is_norm if norms else lambda _: False)
        self.factors = nn.Parameter(torch.zeros(spec.blocks, spec.heads))

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor:
        """Return softmax(alpha q k^T scale + bias) v, (B, H, N, d)."""
        factors = (1 + self.factors[self.row(number)]).to(tokens.query.dtype)
        return mix_with(replace(tokens, query=tokens.query * factors[:, None, None]), scale)


class MatrixScale(Adaptation):
    """A factor of every attention weight, shared by heads."""

    bound_to_tokens = True

    def __init__(self, spec: AdaptationSpec) -> None:
        super().__init__(spec.first_block)
        self.factors = nn.Parameter(torch.zeros(spec.blocks, spec.tokens, spec.tokens))

    def resampled(self, state: Mapping[str, torch.Tensor], side: int, new_side: int) -> dict[str, torch.Tensor]:
        """Refuse another grid of patches.

        Raises:
            UnsupportedModelError: If the grid is another one.
        """
        if side != new_side:
            raise UnsupportedModelError(
                f"The factors of attn-scale-matrix for {side} x {side} patches do not fit {new_side} x {new_side}.",
                "attn-scale-matrix has one factor per pair of tokens: it cannot change its image size.",
                "Start from a model of this image size, or use attn-scale.",
            )
        return dict(state)

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor:
        """Return (S * softmax(q k^T scale + bias)) v, (B, H, N, d).

        Raises:
            UnsupportedModelError: If the number of tokens is not that of the factors.
        """
        scores = (tokens.query * scale) @ tokens.key.mT
        count, expected = scores.shape[-1], self.factors.shape[-1]
        if count != expected:
            raise UnsupportedModelError(
                f"The attention has {count} tokens instead of {expected}.",
                "attn-scale-matrix has one factor per pair of tokens: it cannot change its image size.",
                "Train it at this image size, or use attn-scale.",
            )
        if tokens.bias is not None:
            scores = scores + tokens.bias
        weights = scores.softmax(dim=-1)
        return ((1 + self.factors[self.row(number)]).to(weights.dtype) * weights) @ tokens.value


def _make(spec: AdaptationSpec, _options: None) -> Adaptation:
    return MatrixScale(spec) if spec.method == "attn-scale-matrix" else HeadScale(spec, spec.method == "ln-scale")


METHOD = AdaptationMethod(_make)
