"""Attentive probe: learnable queries pool the cached tokens, a linear head reads what they found.

Efficient Probing (arXiv 2506.10178) drops the projections of multi-head cross-attention: the tokens themselves are the
keys, and each of M learnable queries has its own softmax over them. Here the LPM has projected already: what is cached
are the keys and values of each head, so the queries of a layer attend to those, head by head:

    y[l, m, h] = sum_j softmax_j(q[l, m, h] . k[l, h, j] / sqrt(d)) v[l, h, j]
    logits     = W normalise(y) + b

A head of values with twice the size of another says nothing more: each y[l, m] (width D) is normalised to mean 0 and
deviation 1 before the linear head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from schemas.results import AttentiveSpec
from stages.methods.cached_tokens import Cached
from stages.methods.joint_attention import SingleExpert, member_logits

QUERY_STD = 0.02
"""Of the queries at the start: attention begins nearly uniform, and different from query to query."""


class AttentiveProbe(SingleExpert):
    """Logits from cached keys and values alone."""

    def __init__(self, spec: AttentiveSpec) -> None:
        super().__init__()
        self.spec = spec
        self.queries = nn.Parameter(torch.empty(spec.layers, spec.queries, spec.lpm_width))
        self.head = nn.Linear(spec.layers * spec.queries * spec.lpm_width, spec.classes)
        nn.init.normal_(self.queries, std=QUERY_STD)
        # A head that says nothing yet, as logistic regression starts: its many inputs would add up to noise.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def depth(self) -> int:
        """Tapped layers."""
        return self.spec.layers

    def begin(self, _image: torch.Tensor | None) -> list[torch.Tensor]:
        """What was found so far: nothing."""
        return []

    def asks(self, layer: int) -> torch.Tensor:
        """(P, D)."""
        return self.queries[layer]

    def advance(
        self, _layer: int, state: list[torch.Tensor], mixed: torch.Tensor | None, _checkpointing: bool = False
    ) -> list[torch.Tensor]:
        """What was found so far, and what this layer answered: there is nothing between to compute again."""
        return state if mixed is None else [*state, mixed]

    def finish(self, state: list[torch.Tensor]) -> torch.Tensor:
        """Logits (B, classes) of what all layers answered, each (B, P, D)."""
        pooled = F.layer_norm(torch.stack(state, dim=1), (self.spec.lpm_width,))
        logits: torch.Tensor = self.head(pooled.flatten(1))
        return logits

    def reseed(self, *_entropy: int) -> None:
        """Nothing here draws while it is trained."""

    def forward(
        self, _image: torch.Tensor | None, cached: Cached | None, _pooled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one batch.

        Args:
            cached: Keys and values of all tapped layers, in the type of the store.

        Returns:
            Logits (B, classes).
        """
        return self.join(member_logits(self.members, None, cached))
