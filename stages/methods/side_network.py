"""The side network: a small ViT whose blocks take extra prompt tokens.

Fine-grained Prompt Tuning, arXiv 2403.07576, section 2.2 (asymmetric input) and arXiv 2408.02426, section III.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.resolve import SIDE_PATCH
from schemas.specs import SideNetworkSpec
from stages.methods.kernels import linear, self_attention

NORM_EPS = 1e-12
"""Epsilon of every LayerNorm of the side network, as in the published code."""

INIT_STD = 0.02
"""Standard deviation of the initial weights."""


class Attention(nn.Module):
    """Multi-head self-attention with one projection to queries, keys and values, all with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, kept: int) -> torch.Tensor:
        """(B, N, width) -> (B, kept, width): the first tokens, which attend to all."""
        return linear(self.proj, self_attention(linear(self.qkv, tokens), self.heads, kept))


class Block(nn.Module):
    """Pre-norm transformer block with MLP ratio 4."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: torch.Tensor, kept: int) -> torch.Tensor:
        """(B, N, width) -> (B, kept, width): what follows attention is computed only for the first tokens."""
        tokens = tokens[:, :kept] + self.attn(self.norm1(tokens), kept)
        hidden = linear(cast("nn.Linear", self.mlp[0]), self.norm2(tokens))
        if not torch.is_grad_enabled():
            return tokens + self._narrow(hidden)
        # Four times as wide as a token: the activation is cheaper to compute again than to keep.
        mixed: torch.Tensor = checkpoint(self._narrow, hidden, use_reentrant=False, preserve_rng_state=False)
        return tokens + mixed

    def _narrow(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(cast("nn.Linear", self.mlp[2]), self.mlp[1](hidden))


class SideNetwork(nn.Module):
    """A ViT of one block per tapped layer, width D/8, patch 16, with a linear head on its class token."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        patches = (spec.image_size // SIDE_PATCH) ** 2
        self.patch_embed = nn.Conv2d(3, spec.width, kernel_size=SIDE_PATCH, stride=SIDE_PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, spec.width))
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.head = nn.Linear(spec.width, spec.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the published side network: truncated normal of std 0.02, zero biases.

        That holds for linear layers, patch convolution, class token and position embedding.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(cast("torch.Tensor", module.bias))
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised pixels -> (B, 1 + patches, width), class token first."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1)
        return tokens + self.pos_embed

    def block(self, layer: int, tokens: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
        """Run one block with the prompts (B, P, width) appended to the tokens, and drop them after it.

        What nothing reads is not computed: the prompts' outputs, and after the last block all but the class token.
        """
        kept = 1 if layer == len(self.blocks) - 1 else tokens.shape[1]
        mixed: torch.Tensor = self.blocks[layer](tokens if prompts is None else torch.cat([tokens, prompts], 1), kept)
        return mixed

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> logits (B, classes), from the normalised class token."""
        logits: torch.Tensor = self.head(self.pooled(tokens))
        return logits

    def pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> the normalised class token (B, width)."""
        normed: torch.Tensor = self.norm(tokens[:, 0])
        return normed

    def normed_class_token(self, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        """Return the class token (B, width) of the output of a block, after the norm that comes next."""
        if layer == len(self.blocks) - 1:
            return self.pooled(tokens)
        block: Any = self.blocks[layer + 1]
        normed: torch.Tensor = block.norm1(tokens[:, 0])
        return normed
