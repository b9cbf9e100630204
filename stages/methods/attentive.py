"""Attentive probe: learnable queries pool the cached tokens, a linear head classifies the result.

Efficient Probing (arXiv 2506.10178) drops the projections of multi-head cross-attention: the tokens themselves are the
keys, and each of M learnable queries has its own softmax over them. Here the LPM has projected already: the cache holds
keys and values of each head, so the queries of a layer attend to those, head by head:

    y[l, m, h] = sum_j softmax_j(q[l, m, h] . k[l, h, j] / sqrt(d)) v[l, h, j]
    logits     = W normalise(y) + b

The scale of the values of a head carries no information: each y[l, m] (width D) is normalised to mean 0 and
deviation 1 before the linear head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from schemas.features import LpmInfo
from schemas.resolved import ResolvedSettings
from schemas.specs import AttentiveSpec, MethodSpec
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.joint_attention import TokenNetwork

QUERY_STD = 0.02
"""Standard deviation of the initial queries: attention begins nearly uniform, and differs between queries."""


class AttentiveProbe(TokenNetwork):
    """A classifier of cached keys and values only."""

    spec: AttentiveSpec

    def __init__(self, spec: AttentiveSpec) -> None:
        super().__init__()
        self.spec = spec
        self.queries = nn.Parameter(torch.empty(spec.layers, spec.queries, spec.lpm_width))
        self.head = nn.Linear(spec.layers * spec.queries * spec.lpm_width, spec.classes)
        nn.init.normal_(self.queries, std=QUERY_STD)
        # Zero, as logistic regression starts: the many inputs of a random head would add up to noise.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def depth(self) -> int:
        """Tapped layers."""
        return self.spec.layers

    def begin(self, _image: torch.Tensor | None) -> list[torch.Tensor]:
        """Return the contexts so far: none."""
        return []

    def layer_queries(self, layer: int) -> torch.Tensor:
        """Return the queries (P, D) of a layer."""
        return self.queries[layer]

    def advance(
        self, _layer: int, state: list[torch.Tensor], mixed: torch.Tensor | None, _checkpointing: bool = False
    ) -> list[torch.Tensor]:
        """Return the contexts so far and that of this layer; there is nothing in between to compute again."""
        return state if mixed is None else [*state, mixed]

    def finish(self, state: list[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, classes) from the contexts (B, P, D) of all layers."""
        return self.vector_logits(self.head_vector(state))

    @property
    def head_width(self) -> int:
        """Inputs of the head."""
        return self.head.in_features

    def head_vector(self, state: list[torch.Tensor]) -> torch.Tensor:
        """Return the normalised contexts of all layers side by side, (B, F)."""
        return F.layer_norm(torch.stack(state, dim=1), (self.spec.lpm_width,)).flatten(1)

    def vector_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) of normalised contexts."""
        logits: torch.Tensor = self.head(vectors)
        return logits

    prompt_width = 0
    """It has no tokens of its own among which prompts could stand."""


class AttentiveMethod(GradientMethod):
    """The attentive probe as a method."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> AttentiveSpec:
        """Return the spec of resolved settings."""
        return AttentiveSpec(
            classes=classes,
            layers=len(settings.features.layers),
            lpm_width=lpm.width,
            heads=lpm.heads,
            queries=settings.train.prompts,
            task=settings.data.task,
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build the probe of a spec."""
        return AttentiveProbe(cast("AttentiveSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return the number of queries."""
        return (("Queries per block", str(cast("AttentiveSpec", spec).queries)),)


METHOD = AttentiveMethod()
