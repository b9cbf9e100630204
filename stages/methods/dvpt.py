"""Dynamic Visual Prompt Tuning (arXiv 2307.09787): prompts that attend to the tokens of an image, and shared adapters.

The released code and the paper differ, so there are two methods. Both add a gated adapter next to every MLP, shared by
three consecutive blocks, where u is the sum of attention and residual:

    x' = u + mlp(norm2(u)) + g (W_up quick_gelu(W_down u + b_down) + b_up),    g = 0 at first

`dvpt` is our reading of the paper, of which only the abstract was read, and of the released Swin and SegFormer: each
block has m prompts P, and their mean result is added to the class token,

    o = softmax(P u^T / sqrt(D)) u,    u_class = u_class + g' mean_m o,    g' = 0 at first,

where the released code adds o to the first m tokens, which are patches. It starts as the LPM. The 0.5 % parameters of
the paper fit neither method: which configuration it had is UNVERIFIED.

`dvpt-release` is the released ViT: 50 prompts with positions are tokens of the LPM from its first adapted block to its
last one. The released code computes the attention of prompts to tokens, too, and does not use it. There the mean of the
normalised prompts and class token is classified; here it is what the LPM pools, as for every other method. It does not
start as the LPM.

Groups of three are counted from the first adapted block. In an LPM with LayerScale the adapters are scaled as the MLP
is; the released models have none.
"""

from __future__ import annotations

import torch
from torch import nn

from schemas.cross_adaptations import DvptReleaseSettings, DvptSettings
from schemas.errors import UnsupportedModelError
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, insert_behind
from stages.methods.adapted_lpm import AdaptationMethod

SHARED = 3
"""Consecutive blocks with the same adapter."""
INITIAL = 0.02
"""Standard deviation of the initial prompts of dvpt, as in the released Swin."""


class GatedAdapter(nn.Module):
    """g (W_up quick_gelu(W_down u + b_down) + b_up)."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, latent)
        self.up = nn.Linear(latent, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = self.down(tokens)
        added: torch.Tensor = self.gate * self.up(hidden * torch.sigmoid(1.702 * hidden))
        return added


class SharedAdapters(Adaptation):
    """Gated adapters parallel to the MLPs."""

    def __init__(self, spec: AdaptationSpec, latent: int) -> None:
        super().__init__(spec.first_block)
        groups = -(-spec.blocks // SHARED)
        self.adapters = nn.ModuleList(GatedAdapter(spec.width, latent) for _ in range(groups))

    def mlp_out(
        self,
        number: int,
        output: torch.Tensor,
        tokens: torch.Tensor,
        normed: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """Add the output of the block's adapter."""
        added: torch.Tensor = self.adapters[self.row(number) // SHARED](tokens)
        return output + added


class DynamicPrompts(SharedAdapters):
    """Prompts that attend to the tokens of an image, for its class token."""

    def __init__(self, spec: AdaptationSpec, options: DvptSettings) -> None:
        super().__init__(spec, options.latent)
        prompts = torch.empty(spec.blocks, options.prompts, spec.width)
        self.prompts = nn.Parameter(nn.init.trunc_normal_(prompts, std=INITIAL))
        self.gates = nn.Parameter(torch.zeros(spec.blocks))

    def attach(self, lpm: object) -> None:
        """Refuse an LPM without a class token.

        Raises:
            UnsupportedModelError: If it has none.
        """
        if getattr(lpm, "cls_token", None) is None:
            raise UnsupportedModelError(
                f"{type(lpm).__name__} cannot be adapted by dvpt.",
                "It has no class token, to which the result of the prompts could be added.",
                "Choose dvpt-release, or an LPM such as vit_base_patch16_384.",
            )

    def between(self, number: int, block: object, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the gated mean of softmax(P u^T / sqrt(D)) u to the class token."""
        row = self.row(number)
        scores = tokens @ self.prompts[row].T * tokens.shape[-1] ** -0.5
        result = scores.softmax(dim=1).mean(dim=-1)[:, None] @ tokens
        return torch.cat([tokens[:, :1] + self.gates[row] * result, tokens[:, 1:]], dim=1)


class PromptTokens(SharedAdapters):
    """Prompts that are tokens of all adapted blocks."""

    def __init__(self, spec: AdaptationSpec, options: DvptReleaseSettings) -> None:
        super().__init__(spec, options.latent)
        self.added_tokens, self.prefix = options.prompts, spec.prefix_tokens
        self.prompts = nn.Parameter(torch.randn(options.prompts, spec.width))
        self.positions = nn.Parameter(spec.width**-0.5 * torch.randn(options.prompts, spec.width))

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add the prompts behind the prefix tokens."""
        return insert_behind(tokens, self.prompts + self.positions, self.prefix)


def _make(spec: AdaptationSpec, options: DvptSettings | DvptReleaseSettings) -> Adaptation:
    return DynamicPrompts(spec, options) if isinstance(options, DvptSettings) else PromptTokens(spec, options)


METHOD = AdaptationMethod(_make)
