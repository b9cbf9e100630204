"""Adapters: a bottleneck at every MLP of the LPM.

    adapter        mlp <- mlp + W_u GELU(W_d mlp + b_d) + b_u            after the MLP, within the residual connection
    adaptformer    mlp <- mlp + 0.1 (W_u ReLU(W_d u + b_d) + b_u)        parallel to the MLP; u enters norm2

`adapter` is that of arXiv 1902.00751 at the place where VPT (arXiv 2203.12119) has its comparator. The code of VPT
starts with zeros everywhere: the gradients of W_d and W_u are then 0 for ever, and only b_u learns. Here W_d is
Kaiming-uniform and only W_u and the biases are zero, as in LoRA and AdaptFormer (arXiv 2205.13535).

The paper of AdaptFormer writes norm2(u) for u; its code reads u, and so does this. Its dropout in the bottleneck is
left out. LayerScale, which neither has, multiplies MLP and adapter.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from schemas.specs import AdaptationSpec
from schemas.weight_adaptations import AdapterSettings, AdaptFormerSettings
from stages.lpm.adaptation import Adaptation
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.base import Details

SCALE = 0.1
"""Factor of AdaptFormer's bottleneck, as published."""


class Bottlenecks(Adaptation):
    """One bottleneck per block."""

    def __init__(self, spec: AdaptationSpec, width: int, parallel: bool) -> None:
        """Draw the first layers; the second ones are zero.

        Args:
            spec: Shape of the LPM.
            width: Channels of the bottleneck.
            parallel: Whether it reads what enters the second norm of the block, instead of the output of the MLP.
        """
        super().__init__(spec.first_block)
        self._parallel = parallel
        down = [nn.Linear(spec.width, width) for _ in range(spec.blocks)]
        up = [nn.Linear(width, spec.width) for _ in range(spec.blocks)]
        for layer in (*down, *up):
            nn.init.zeros_(layer.bias)
        for layer in down:
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        for layer in up:
            nn.init.zeros_(layer.weight)
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def mlp_out(
        self,
        number: int,
        output: torch.Tensor,
        tokens: torch.Tensor,
        normed: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """Add the output of the bottleneck to that of the MLP."""
        down, up = self.down[self.row(number)], self.up[self.row(number)]
        added: torch.Tensor = SCALE * up(F.relu(down(tokens))) if self._parallel else up(F.gelu(down(output)))
        return output + added


def _make(spec: AdaptationSpec, options: AdapterSettings | AdaptFormerSettings) -> Adaptation:
    return Bottlenecks(spec, options.width, parallel=spec.method == "adaptformer")


def _describe(_spec: AdaptationSpec, options: AdapterSettings | AdaptFormerSettings) -> Details:
    return (("Channels of the bottleneck", f"{options.width}"),)


METHOD = AdaptationMethod(_make, _describe)
