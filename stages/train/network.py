"""Fusion and side network together: what stage two trains."""

from __future__ import annotations

import torch
from torch import nn

from schemas.results import SideNetworkSpec
from stages.train.cached import Cached
from stages.train.fusion import Fusion
from stages.train.side_network import SideNetwork


class PromptedSideNetwork(nn.Module):
    """Logits from a small image and the cached keys and values of the LPM.

    With method "side" there are no prompts and the cached features are not used: the same side network alone.
    """

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.side = SideNetwork(spec)
        self.fusion = None if spec.method == "side" else Fusion(spec)

    def forward(
        self, image: torch.Tensor, cached: Cached | None = None, _pooled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one batch.

        Args:
            image: (B, 3, S, S), normalised.
            cached: Keys and values in the type of the store; may be None for method "side".

        Returns:
            Logits (B, classes).
        """
        tokens = self.side.embed(image)
        for layer in range(self.spec.layers):
            prompts = None
            if self.fusion is not None:
                if cached is None:
                    raise ValueError(f"method {self.spec.method} needs keys and values")
                prompts = self.fusion(layer, cached.layer(layer))
            tokens = self.side.block(layer, tokens, prompts)
        return self.side.classify(tokens)


def learnable_parameters(network: nn.Module) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
