"""Domain residual adapter: an offset of the output of every attention and of every MLP (eTT, arXiv 2301.02419).

    y <- attention(z) + delta_1                mlp <- mlp(z') + delta_2                delta (D,) per block, from 0

before LayerScale. From the code of eTT; its prefix and its episodes are left out. For prediction the offsets are folded
into the biases of the last layers, exactly. Without LayerScale this is BitFit restricted to these two biases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation
from stages.methods.adapted_lpm import AdaptationMethod


class Offsets(Adaptation):
    """Two offsets per block."""

    def __init__(self, spec: AdaptationSpec) -> None:
        super().__init__(spec.first_block)
        self.attention, self.mlp = (nn.Parameter(torch.zeros(spec.blocks, spec.width)) for _ in range(2))
        self._folded = False

    def attention_out(self, number: int, output: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the offset of the attention."""
        return output if self._folded else output + self.attention[self.row(number)].to(output.dtype)

    def mlp_out(
        self,
        number: int,
        output: torch.Tensor,
        tokens: torch.Tensor,  # noqa: ARG002
        normed: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """Add the offset of the MLP."""
        return output if self._folded else output + self.mlp[self.row(number)].to(output.dtype)

    def fold(self, lpm: Any) -> None:
        """Add the offsets to the biases of the last layers."""
        for number, block in self.adapted(lpm):
            _add_to_bias(block.attn.proj, self.attention[self.row(number)])
            _add_to_bias(block.mlp.fc2, self.mlp[self.row(number)])
        self._folded = True


def _add_to_bias(layer: nn.Linear, offset: torch.Tensor) -> None:
    bias: torch.Tensor | None = layer.bias
    added = offset.to(layer.weight)
    layer.bias = nn.Parameter(added if bias is None else bias + added, requires_grad=False)


METHOD = AdaptationMethod(lambda spec, _: Offsets(spec))
