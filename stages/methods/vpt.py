"""Visual Prompt Tuning (arXiv 2203.12119): learnable tokens among those of the image.

`vpt-shallow` inserts m prompts P (m, D) before the first adapted block; they pass through all blocks and are cut off
before the final norm:

    x = [prefix; P; patches]

`vpt-deep` replaces the prompts at every block, so that no output of theirs is ever read. They are then nothing but m
further keys and values of each block (identity 5):

    k_p, v_p = heads(W_qkv norm1(P_l) + b)

computed once per step, and at prediction once. Sequence length, queries and MLP remain those of the image.

Prompts are drawn from U(-v, v), v = sqrt(6 / (3 p^2 + D)) with patches of side p, as published. They have no position.
Ours: no prompt dropout (the published commands have 0.1, the default of the published code is 0), AdamW in place of
SGD, and prompts are never part of a mean over tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from schemas.prompt_adaptations import VptSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, KeysValues, insert_behind, keys_values
from stages.methods.adapted_lpm import AdaptationMethod


def initial_prompts(spec: AdaptationSpec, *shape: int) -> nn.Parameter:
    """Return prompts (*shape, D) with initial values as published."""
    bound = math.sqrt(6.0 / (3 * spec.patch**2 + spec.width))
    return nn.Parameter(bound * (2.0 * torch.rand(*shape, spec.width) - 1.0))


class ShallowPrompts(Adaptation):
    """VPT-shallow."""

    def __init__(self, spec: AdaptationSpec, options: VptSettings) -> None:
        super().__init__(spec.first_block)
        self.prefix, self.added_tokens = spec.prefix_tokens, options.prompts
        self.prompts = initial_prompts(spec, options.prompts)

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Insert the prompts behind the prefix, (B, N + m, D)."""
        return insert_behind(tokens, self.prompts, self.prefix)


class ConstantTokens(Adaptation):
    """What VPT-deep and its variants share: keys and values of prompts that every block replaces."""

    folded: torch.Tensor | None

    def __init__(self, first_block: int) -> None:
        super().__init__(first_block)
        # Not saved: keys and values of all blocks, (blocks, 2, 1, H, m, d), once they do not change any more.
        self.register_buffer("folded", None, persistent=False)

    def tokens(self, row: int) -> torch.Tensor:
        """Return the prompts (m, D) of an adapted block."""
        raise NotImplementedError

    def constants(self, number: int, block: Any) -> KeysValues:
        """Compute the keys and values (1, H, m, d) of a block."""
        return keys_values(block, self.tokens(self.row(number)))

    def extra(self, number: int, block: Any) -> KeysValues:
        """Return the keys and values (1, H, m, d) of a block."""
        if self.folded is None:
            return self.constants(number, block)
        key, value = self.folded[self.row(number)]
        return key, value

    def fold(self, lpm: Any) -> None:
        """Compute the keys and values of all adapted blocks."""
        self.folded = torch.stack([torch.stack(self.constants(number, block)) for number, block in self.adapted(lpm)])


class DeepPrompts(ConstantTokens):
    """VPT-deep."""

    def __init__(self, spec: AdaptationSpec, count: int) -> None:
        """Draw initial prompts.

        Args:
            spec: Shape of the LPM, and its adapted blocks.
            count: Prompts per block.
        """
        super().__init__(spec.first_block)
        self.prompts = initial_prompts(spec, spec.blocks, count)

    def tokens(self, row: int) -> torch.Tensor:
        """Return the prompts (m, D) of an adapted block."""
        return self.prompts[row]


def _make(spec: AdaptationSpec, options: VptSettings) -> Adaptation:
    return ShallowPrompts(spec, options) if spec.method == "vpt-shallow" else DeepPrompts(spec, options.prompts)


METHOD = AdaptationMethod(_make)
