"""MLP-3: an MLP with two hidden layers as head, the comparator of VPT (arXiv 2203.12119) and of EPT.

    logits = W_3 ReLU(W_2 ReLU(W_1 p + b_1) + b_2) + b_3        hidden layers of width D

p is the cached class token after the final norm, or the mean of the patch tokens in an LPM without class token: the LPM
does not run. The code of VPT has a batch norm in each hidden layer; it is left out, as the published number of
parameters (1.44 % of ViT-B/16) has none. Hidden layers start Kaiming-normal (fan out), as published, the last one at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from schemas.features import LpmInfo
from schemas.probe_specs import PooledSpec
from schemas.resolved import ResolvedSettings
from schemas.specs import MethodSpec
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.batch import Batch, required


class PooledMlp(Network):
    """An MLP of the class token."""

    spec: PooledSpec
    has_head = True

    def __init__(self, spec: PooledSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.features // 2
        hidden = [nn.Linear(width, width) for _ in range(2)]
        self.head = nn.Linear(width, spec.classes)
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(hidden)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:  # noqa: ARG004
        """Compute logits (M, B, classes), one network after the other; there is nothing to recompute."""
        pooled = required(batch.pooled, "pooled")[:, 0]
        return torch.stack([member.logits(pooled) for member in members])

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of class tokens (B, D)."""
        return self.head_logits(self._last_hidden(pooled))

    def _last_hidden(self, pooled: torch.Tensor) -> torch.Tensor:
        for layer in self.hidden:
            pooled = F.relu(layer(pooled))
        return pooled

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Compute the last hidden layer (B, D) of a prepared batch."""
        return self._last_hidden(required(batch.pooled, "pooled")[:, 0])

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of the last hidden layer."""
        return cast("torch.Tensor", self.head(vectors))


class Mlp3Method(GradientMethod):
    """MLP-3 as a method."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> PooledSpec:
        """Return the spec of resolved settings."""
        return PooledSpec(method=settings.method, classes=classes, task=settings.data.task, features=2 * lpm.width)

    def build(self, spec: MethodSpec) -> Network:
        """Build the network of a spec."""
        return PooledMlp(cast("PooledSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return the shape of the MLP."""
        return (("Hidden layers", f"2 of width {cast('PooledSpec', spec).features // 2}"),)


METHOD = Mlp3Method()
