"""E2VPT (arXiv 2307.13770): VPT-deep with prompts in the keys and values of every head, and with pruning.

Besides the keys and values of P visual prompts (`stages.methods.vpt`), each head of each block has prompts E (KV, d)
that do not pass through any projection or norm:

    K <- [E; K],   V <- [E; V]           E for both (`shared`, as published) or one for each

E is drawn from U(-b, b), b = sqrt(6 / (KV d)). The order in which keys are joined has no effect.

Pruning (`prune`) gives the visual prompts of all blocks one mask per prompt and one per segment of a prompt, of which
each has 16:

    P_l <- P_l * token mask (P, 1) * segment mask (P, 16), each number for D / 16 contiguous channels

in one training of three phases: (1) everything learns, the masks from 1; (2) an epoch at learning rate 0 in which the
mean absolute gradient of each mask over the training batches is its importance; (3) prompts, E and head start again
from their stored initial values, with masks fixed to 0 for the least important prompts, and in each prompt for its
least important segments, else 1. Only an epoch of (3) is kept. A pruned prompt is a vector of zeros: it is still a key,
as in the published code.

Read from the published code and the abstract only. There, importance is the mean signed gradient, measured while the
optimiser steps, segments are strided channels, (3) starts from new random values, and up to 81 pairs of shares are
tried; here the shares are settings. The formula of the paper, and whether it prunes segments per prompt, are
UNVERIFIED. No prompt dropout (published: 0.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from schemas.errors import TrainingError
from schemas.prompt_adaptations import E2vptSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import KeysValues
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.vpt import DeepPrompts
from stages.phases import Phase

SEGMENTS = 16
"""Segments of a visual prompt."""
LEAST_SEGMENTS = 4
"""Segments that every prompt keeps."""


class EffectivePrompts(DeepPrompts):
    """E2VPT without pruning."""

    def __init__(self, spec: AdaptationSpec, options: E2vptSettings) -> None:
        super().__init__(spec, options.prompts)
        shape = (spec.blocks, spec.heads, options.kv_prompts, spec.head_dim)
        bound = math.sqrt(6.0 / (options.kv_prompts * spec.head_dim))
        self.keys = nn.Parameter(bound * (2.0 * torch.rand(shape) - 1.0))
        self.values = None if options.shared else nn.Parameter(bound * (2.0 * torch.rand(shape) - 1.0))

    def constants(self, number: int, block: Any) -> KeysValues:
        """Compute the keys and values (1, H, KV + P, d) of a block."""
        row = self.row(number)
        key, value = super().constants(number, block)
        own_key = self.keys[row]
        own_value = own_key if self.values is None else self.values[row]
        return torch.cat([own_key[None], key], dim=2), torch.cat([own_value[None], value], dim=2)


class PrunedPrompts(EffectivePrompts):
    """E2VPT with pruning."""

    token_importance: torch.Tensor
    segment_importance: torch.Tensor

    def __init__(self, spec: AdaptationSpec, options: E2vptSettings) -> None:
        super().__init__(spec, options)
        prompts = options.prompts
        self.dropped_prompts = min(prompts - 1, math.floor(options.pruned_prompts * prompts))
        self.dropped_segments = min(SEGMENTS - LEAST_SEGMENTS, math.floor(options.pruned_segments * SEGMENTS))
        self.token_mask = nn.Parameter(torch.ones(prompts))
        self.segment_mask = nn.Parameter(torch.ones(prompts, SEGMENTS))
        self.register_buffer("token_importance", torch.zeros(prompts))
        self.register_buffer("segment_importance", torch.zeros(prompts, SEGMENTS))
        self._measuring = False

    def attach(self, lpm: Any) -> None:
        """Store the initial values of all that is trained, which a resumed training draws again from the same seed."""
        self._initial = [
            (module, name, value.detach().clone())
            for module in (self, lpm.head)
            for name, value in module.named_parameters(recurse=False)
        ]

    def tokens(self, row: int) -> torch.Tensor:
        """Return the masked prompts (P, D) of an adapted block."""
        prompts = super().tokens(row)
        width = prompts.shape[-1]
        segment = torch.arange(width, device=prompts.device) * SEGMENTS // width
        return prompts * self.token_mask[:, None] * self.segment_mask[:, segment]

    def phase(self, epoch: int, epochs: int) -> Phase:
        """Return the phase of an epoch: training with masks, the epoch that measures, or training what is left.

        Raises:
            TrainingError: If there are not enough epochs for the three.
        """
        if epochs < 3:
            raise TrainingError(
                f"{epochs} epoch{'s are' if epochs > 1 else ' is'} not enough to prune prompts.",
                "Training, measuring and training again take at least one epoch each.",
                "Set train.epochs to 3 or more, or methods.e2vpt.prune: false.",
            )
        measured = max(2, epochs // 2)
        if epoch < measured:
            return Phase(1, measured - 1)
        return Phase(measured, measured, rate=0.0) if epoch == measured else Phase(measured + 1, epochs)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Train the masks before pruning, and measure their importance in the epoch between."""
        phase = self.phase(epoch, epochs)
        for mask in (self.token_mask, self.segment_mask):
            mask.requires_grad_(phase.last < epochs)
        self._measuring = phase.rate == 0

    def begin_phase(self, epoch: int, epochs: int) -> None:
        """Start again without what is pruned, at the first epoch of the last phase."""
        if self.phase(epoch, epochs).last == epochs:
            self._start_again()

    def read_gradients(self) -> None:
        """Add the absolute gradients of the masks to their importance."""
        if not self._measuring:
            return
        for mask, importance in (
            (self.token_mask, self.token_importance),
            (self.segment_mask, self.segment_importance),
        ):
            if mask.grad is not None:
                importance += mask.grad.abs()

    @torch.no_grad()
    def _start_again(self) -> None:
        """Restore the initial values, and fix the masks."""
        for module, name, value in self._initial:
            getattr(module, name).copy_(value)
        order = self.token_importance.argsort(stable=True)
        self.token_mask[order[: self.dropped_prompts]] = 0.0
        order = self.segment_importance.argsort(dim=1, stable=True)
        self.segment_mask.scatter_(1, order[:, : self.dropped_segments], 0.0)


def _make(spec: AdaptationSpec, options: E2vptSettings) -> EffectivePrompts:
    return PrunedPrompts(spec, options) if options.prune else EffectivePrompts(spec, options)


METHOD = AdaptationMethod(_make)
