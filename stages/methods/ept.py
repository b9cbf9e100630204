"""Embedded Prompt Tuning (arXiv 2407.01003): prompt logits that take part in every softmax and have no value.

As published, d_p learnable logits P_i stand in front of the attention logits of token i, shared by heads and images:

    attention_i = softmax([P_i, q_i k^T / sqrt(d)])[d_p:] v

Only s_i = logsumexp_j P_ij enters the result, which is that of fused attention times sigmoid(lse_i - s_i) (identity 1).
`ept-lse` learns s_i directly, as a sink of fused attention: one number per token and block.

At flat attention the factor is N / (N + d_p), 0.66 for ViT-B at 224 pixels and the published 100 prompts: EPT does not
start as the LPM. The published recipe uses SGD; here AdamW trains both forms, under which they take equal steps, while
SGD would need a rate divided by d_p for `ept-lse` (identity 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from schemas.prompt_adaptations import EptSettings
from schemas.specs import AdaptationSpec
from stages.extract.importance import attend
from stages.lpm.adaptation import Adaptation
from stages.lpm.attention import Projected
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.positions import resample_positions

INITIAL = 0.02
"""Standard deviation of the initial prompt logits, as published."""


MAP = "Share of the attention of each patch that the prompts leave to tokens, mean over heads"
"""Name of the maps of the published factor."""


class _Embedded(Adaptation):
    """What both forms share: the factors sigmoid(lse_i - s_i)."""

    bound_to_tokens = True

    def __init__(self, spec: AdaptationSpec) -> None:
        super().__init__(spec.first_block)
        self.grid, self.prefix = spec.grid, spec.prefix_tokens
        self._factors: list[torch.Tensor] | None = None

    def resampled(self, state: Mapping[str, torch.Tensor], side: int, new_side: int) -> dict[str, torch.Tensor]:
        """Resample the logits of each block on the grid of patches; those of prefix tokens are kept."""
        found = {}
        for name, value in state.items():
            # Offsets are one number per token, prompts d_p of them.
            rows = value if value.dim() == 3 else value.unsqueeze(-1)
            rows = resample_positions(rows, side, new_side, self.prefix)
            found[name] = rows if value.dim() == 3 else rows.squeeze(-1)
        return found

    def logits(self) -> torch.Tensor:
        """Return s, (blocks, N)."""
        raise NotImplementedError

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor | None:
        """Record the factors while `maps` runs; else leave attention to the driver."""
        if self._factors is None:
            return None
        mixed, lse = attend(tokens, scale)
        if lse is None:
            lse = _scores(tokens, scale).logsumexp(dim=-1)
        factors = (lse - self.logits()[self.row(number)]).sigmoid()
        self._factors.append(factors)
        return mixed * factors.unsqueeze(-1).to(mixed.dtype)

    @torch.no_grad()
    def maps(self, forward: Callable[[], object]) -> Mapping[str, torch.Tensor]:
        """Return the factors of all patches of the images of a forward pass, (B, blocks, gh, gw), mean over heads."""
        self._factors = []
        try:
            forward()
            factors = torch.stack([of_block.mean(dim=1) for of_block in self._factors], dim=1)
        finally:
            self._factors = None
        return {MAP: factors[..., self.prefix :].reshape(*factors.shape[:2], self.grid, self.grid)}


def _scores(tokens: Projected, scale: float) -> torch.Tensor:
    """Return the logits of the softmax, (B, H, N, N)."""
    scores = (tokens.query * scale) @ tokens.key.mT
    return scores if tokens.bias is None else scores + tokens.bias


class EmbeddedPrompts(_Embedded):
    """EPT as published, with the matrix of all attention weights."""

    def __init__(self, spec: AdaptationSpec, options: EptSettings) -> None:
        super().__init__(spec)
        self.prompts = nn.Parameter(INITIAL * torch.randn(spec.blocks, spec.tokens, options.prompts))

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor | None:
        """Return softmax([P, scores])[:, d_p:] v, (B, H, N, d)."""
        if (recorded := super().mix(number, tokens, scale)) is not None:
            return recorded
        scores = _scores(tokens, scale)
        prompts = self.prompts[self.row(number)].to(scores.dtype)
        logits = torch.cat([prompts.expand(*scores.shape[:2], -1, -1), scores], dim=-1)
        return logits.softmax(dim=-1)[..., prompts.shape[-1] :] @ tokens.value

    def logits(self) -> torch.Tensor:
        """Return s, (blocks, N)."""
        return self.prompts.logsumexp(dim=-1)


class EmbeddedLogits(_Embedded):
    """EPT with s = log d_p + u, and u learnable from 0 (identity 4)."""

    def __init__(self, spec: AdaptationSpec, options: EptSettings) -> None:
        super().__init__(spec)
        self.base = math.log(options.prompts)
        self.offsets = nn.Parameter(torch.zeros(spec.blocks, spec.tokens))

    def sink(self, number: int) -> torch.Tensor:
        """Return the logits s of a block, (N,)."""
        return self.logits()[self.row(number)]

    def logits(self) -> torch.Tensor:
        """Return s, (blocks, N)."""
        return self.base + self.offsets


def _make(spec: AdaptationSpec, options: EptSettings) -> Adaptation:
    return EmbeddedPrompts(spec, options) if spec.method == "ept" else EmbeddedLogits(spec, options)


METHOD = AdaptationMethod(_make)
