"""Reference forward pass of FPT and FPT+, as in the papers.

`PromptedSideNetwork` computes the same from quantised codes, for several members at once, and skips outputs that are
not read. Equality of outputs and gradients is tested in `tests/stages/methods/test_reference.py`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.nn.functional import softmax

from stages.methods.fpt import PromptedSideNetwork
from stages.methods.side_network import Block


def reference_forward(
    network: PromptedSideNetwork, image: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of FPT (arXiv 2403.07576, section 2) or FPT+ (arXiv 2408.02426, section III).

    Args:
        network: Network with the weights; its dropout applies in training mode.
        image: Normalised small images, (B, 3, S, S).
        keys: Cached keys per tapped layer and head, (B, L, H, T, d) floats.
        values: Cached values, of the same shape.

    Returns:
        Logits, (B, classes).
    """
    side, fusion, (batch, layers, heads, _, head_width) = network.side, network.fusion, keys.shape
    x = torch.cat([side.cls_token.expand(batch, -1, -1), side.patch_embed(image).flatten(2).mT], 1) + side.pos_embed
    for layer in range(layers):
        if fusion is not None:
            prompts = fusion.prompts[layer]
            query = fusion.query(prompts).view(-1, heads, head_width).transpose(0, 1)  # (H, P, d)
            attention = softmax(query @ keys[:, layer].mT / head_width**0.5, dim=-1)  # (B, H, P, T)
            context = (attention @ values[:, layer]).transpose(1, 2).flatten(2)  # (B, P, D)
            fused = fusion.out(context + prompts) if fusion.wide else fusion.out(context) + prompts
            x = torch.cat([x, fusion.dropout(fused)], 1)
        block, tokens = cast("Block", side.blocks[layer]), side.pos_embed.shape[1]
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        x = (x + block.mlp(block.norm2(x)))[:, :tokens]  # The prompts are dropped after each block.
    return cast("torch.Tensor", side.head(side.norm(x[:, 0])))
