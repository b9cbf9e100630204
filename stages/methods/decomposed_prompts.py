"""Decomposed prompts: VPT-deep whose prompts are a low-rank matrix per block (arXiv 2407.11573).

    P_l = U_l V_l        U_l (m, r), V_l (r, D)

and then are keys and values as in VPT-deep (`stages.methods.vpt`): r (m + D) parameters per block in place of m D. U
starts Kaiming-uniform and V at 0, so that all prompts start at 0: not the LPM, since a zero prompt has the bias of the
norm as its input, but no random tokens.

A translation: of the paper only the abstract was readable, no code is public, and both the initial values and the place
of the prompts are our reading (UNVERIFIED). With `freeze_u` the prompts are linear in what is trained.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from schemas.prompt_adaptations import DecomposedPromptSettings
from schemas.specs import AdaptationSpec
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.base import Details
from stages.methods.vpt import ConstantTokens


class DecomposedPrompts(ConstantTokens):
    """Low-rank prompts."""

    def __init__(self, spec: AdaptationSpec, options: DecomposedPromptSettings) -> None:
        super().__init__(spec.first_block)
        self.left = nn.Parameter(torch.empty(spec.blocks, options.prompts, options.rank))
        self.right = nn.Parameter(torch.zeros(spec.blocks, options.rank, spec.width))
        # Kaiming-uniform of each U (m, r) with a = sqrt(5), as the first factor of LoRA.
        nn.init.uniform_(self.left, -1.0 / math.sqrt(options.rank), 1.0 / math.sqrt(options.rank))
        self.left.requires_grad_(not options.freeze_u)

    def tokens(self, row: int) -> torch.Tensor:
        """Return the prompts U V (m, D) of an adapted block."""
        return self.left[row] @ self.right[row]


def _describe(_spec: AdaptationSpec, options: DecomposedPromptSettings) -> Details:
    frozen = ", first factor frozen" if options.freeze_u else ""
    return (("Prompts per block", f"{options.prompts} of rank {options.rank}{frozen}"),)


METHOD = AdaptationMethod(DecomposedPrompts, _describe)
