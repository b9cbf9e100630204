"""Prefix tuning (arXiv 2101.00190) of the LPM, and PT-PEFT (arXiv 2411.00029): prefix tuning, then LoRA as well.

`prefix`: every head of every block has m learnable keys and values that all queries attend to,

    o = softmax(q [K_p; K]^T / sqrt(d)) [V_p; V]

with K_p from N(0, 0.02) and V_p 0. This is not the LPM even so: the prefix takes part in the softmax, and at flat
attention leaves N / (N + m) of it to the tokens (0.92 with 16 prompts and 197 tokens).

`pt-peft`: the first half of the epochs trains the prefix and the head; the second half trains these and LoRA of rank r
on the projections to queries, keys and values,

    W x + B A x,   A from U(-1/sqrt(D), 1/sqrt(D)), B 0

with a new optimiser state and a new cosine schedule at half the rate, so that there are as many epochs as in a training
with LoRA only. Attentions with separate projections have LoRA on those of queries and values, which is the same number
of parameters. At prediction, B A is added to W.

PT-PEFT is a translation of an abstract to ViT classifiers: it was published for language models that read images.
Prefix length, ranks, rates and share of the epochs are ours (UNVERIFIED); its prefix encoder is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from schemas.prompt_adaptations import PrefixSettings, PtPeftSettings
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, KeysValues
from stages.lpm.attention import projections
from stages.methods.adapted_lpm import AdaptationMethod
from stages.phases import Phase

INITIAL = 0.02
"""Standard deviation of the initial keys."""


class Prefix(Adaptation):
    """Prefix tuning."""

    def __init__(self, spec: AdaptationSpec, options: PrefixSettings | PtPeftSettings) -> None:
        super().__init__(spec.first_block)
        shape = (spec.blocks, spec.heads, options.prompts, spec.head_dim)
        self.keys = nn.Parameter(INITIAL * torch.randn(shape))
        self.values = nn.Parameter(torch.zeros(shape))

    def extra(self, number: int, block: Any) -> KeysValues:  # noqa: ARG002
        """Return the keys and values (1, H, m, d) of a block."""
        row = self.row(number)
        return self.keys[row][None], self.values[row][None]


class LowRank(nn.Module):
    """LoRA of one linear map: B A x."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        """Draw initial values.

        Args:
            linear: Map that is changed; only its shape is read.
            rank: r.
        """
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the change (B, N, out) of the output for tokens (B, N, in)."""
        return F.linear(F.linear(tokens, self.down), self.up)

    def matrix(self) -> torch.Tensor:
        """Return B A, (out, in)."""
        return self.up @ self.down


class PrefixThenLowRank(Prefix):
    """PT-PEFT; as built, in its second phase."""

    def __init__(self, spec: AdaptationSpec, options: PtPeftSettings) -> None:
        super().__init__(spec, options)
        self.rank = options.rank
        self.updates = nn.ModuleList()
        self._hooked: list[tuple[nn.Linear, LowRank, RemovableHandle]] = []
        self._low_rank = True

    def attach(self, lpm: Any) -> None:
        """Add LoRA to the projections of the adapted blocks, without new names in the LPM."""
        for _, block in self.adapted(lpm):
            for linear in _changed(block.attn):
                update = LowRank(linear, self.rank)
                self.updates.append(update)
                self._hooked.append((linear, update, linear.register_forward_hook(self._hook(update))))

    def _hook(self, update: LowRank) -> Any:
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + update(inputs[0]) if self._low_rank else output

        return add

    def phase(self, epoch: int, epochs: int) -> Phase:
        """Return the phase of an epoch: without LoRA, or with it; a single epoch is one with it."""
        half = epochs // 2
        return Phase(1, half) if epoch <= half else Phase(half + 1, epochs, rate=0.5)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Leave LoRA, whose B is 0, out of the first phase."""
        self._low_rank = epoch > epochs // 2
        self.updates.requires_grad_(self._low_rank)

    def fold(self, lpm: Any) -> None:  # noqa: ARG002
        """Add LoRA to the weights of the projections."""
        for linear, update, handle in self._hooked:
            handle.remove()
            linear.weight = nn.Parameter(linear.weight + update.matrix(), requires_grad=False)
        self._hooked.clear()


def _changed(attention: Any) -> list[nn.Linear]:
    """Return the linear maps of an attention that LoRA changes: the one to queries, keys and values, or two."""
    return [attention.get_submodule(name) for name in projections(attention) if name != "k_proj"]


def _make(spec: AdaptationSpec, options: PrefixSettings | PtPeftSettings) -> Prefix:
    return PrefixThenLowRank(spec, options) if isinstance(options, PtPeftSettings) else Prefix(spec, options)


METHOD = AdaptationMethod(_make)
