"""Attentive layer fusion: a learnable query attends to the class token and the mean token of every block of the LPM.

ALF (arXiv 2601.09322) classifies an image by 2 L vectors, h[2 l] the class token and h[2 l + 1] the mean of the patch
tokens that block l returns (without a class token L vectors):

    k[i], v[i] = W_k norm_k(h[i]), W_v norm_v(h[i])           q = W_q norm_q(query)           per head
    fused      = W_o sum_i dropout(softmax_i(q . k[i] / sqrt(d))) v[i]
    logits     = W normalise(fused) + b

From the paper and its code (github.com/lciernik/attentive-layer-fusion): as many heads as vectors, each twice as wide
as D / heads, projections without bias except W_o, a query drawn from N(0, 0.02^2), no positional embedding, dropout
only of the attention weights. There, BatchNorm of the fused vector removes what is common to all images. Ours: the
vectors are standardised by mean and deviation of the training images instead, and the fused vector is normalised per
image, so that gradient accumulation gives the same model; since standardised vectors of all blocks are alike, gain and
bias of norm_k and norm_v are those of one vector each; the head starts at zero. The noise that the paper adds to the
vectors in training is left out, and so are its optimiser and its search of hyperparameters: the loop is that of all
networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from schemas.features import LpmInfo
from schemas.resolved import ResolvedSettings
from schemas.specs import AlfSpec, MethodSpec
from schemas.statistics import output_vectors, segments
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.batch import Batch, required
from stages.methods.fusion import PromptDropout

QUERY_STD = 0.02
"""Standard deviation of the initial query."""

SMALLEST = 1e-6
"""Deviation below which a number does not vary: what rounding leaves of it."""

HEAD_FACTOR = 2
"""Width of a head, as a multiple of D / heads."""


class LayerFusion(Network):
    """A classifier of the class token and the mean token of every block."""

    spec: AlfSpec
    mean: torch.Tensor
    """(n, D) of the training images."""
    scale: torch.Tensor
    """(n, D) standard deviation over the training images; 1 where they do not vary."""
    standardises = True
    has_head = True

    def __init__(self, spec: AlfSpec) -> None:
        super().__init__()
        self.spec = spec
        width, count = spec.lpm_width, len(spec.vectors)
        inner = spec.heads * _head_width(spec)
        self.register_buffer("mean", torch.zeros(count, width))
        self.register_buffer("scale", torch.ones(count, width))
        self.query = nn.Parameter(torch.empty(width))
        self.query_norm = nn.LayerNorm(width)
        self.key_gain, self.value_gain = (nn.Parameter(torch.ones(count, width)) for _ in range(2))
        self.key_bias, self.value_bias = (nn.Parameter(torch.zeros(count, width)) for _ in range(2))
        self.to_query, self.to_key, self.to_value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.classes)
        self.dropout = PromptDropout(spec.dropout)
        nn.init.normal_(self.query, std=QUERY_STD)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:  # noqa: ARG004
        """Compute logits (M, B, classes), one network after the other.

        Checkpointing would save nothing: what is kept for the backward pass is a few vectors per image.
        """
        rows = required(batch.statistics, "statistics")
        return torch.stack([member.logits(rows) for member in members])

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of token statistics (B, F)."""
        return self.head_logits(self._fused(rows))

    def _fused(self, rows: torch.Tensor) -> torch.Tensor:
        vectors = F.layer_norm((self._vectors(rows) - self.mean) / self.scale, (self.spec.lpm_width,))
        weights = self.attention(vectors)
        weights = self.dropout.apply_drawn(weights, self.dropout.draw(weights, weights.shape[-1]))
        values = self._split(self.to_value(vectors * self.value_gain + self.value_bias))
        fused = self.out(torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1))
        return cast("torch.Tensor", self.norm(fused))

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Compute the normalised fused vector (B, D) of a prepared batch."""
        return self._fused(required(batch.statistics, "statistics"))

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of fused vectors."""
        return cast("torch.Tensor", self.head(vectors))

    def standardise(self, batches: Iterable[Batch]) -> None:
        """Take over mean and deviation of each number of the vectors of the training images."""
        count, total, squares = 0, torch.zeros(self.mean.shape).double(), torch.zeros(self.mean.shape).double()
        for batch in batches:
            vectors = self._vectors(required(batch.statistics, "statistics")).double()
            count += len(vectors)
            total += vectors.sum(dim=0)
            squares += vectors.square().sum(dim=0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min_(0).sqrt_()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > SMALLEST, deviation, 1.0))

    def _vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, n, D) float32 of token statistics (B, F)."""
        width = self.spec.lpm_width
        return torch.stack([rows[:, start : start + width] for start in self.spec.vectors], dim=1).float()

    def attention(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the attention weights (B, heads, n) of standardised, normalised vectors (B, n, D)."""
        query = self.to_query(self.query_norm(self.query)).view(self.spec.heads, -1)
        keys = self._split(self.to_key(vectors * self.key_gain + self.key_bias))
        scores = torch.einsum("hd,bnhd->bhn", query * _head_width(self.spec) ** -0.5, keys)
        return scores.softmax(dim=-1)

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(*projected.shape[:2], self.spec.heads, -1)

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine."""
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        self.dropout.generator = torch.Generator(self.query.device).manual_seed(seed)

    def set_micro_batch(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Draw the dropout of the complete batch, and use that of some rows."""
        self.dropout.draw_part(rows, batch_rows, again=again)


def _head_width(spec: AlfSpec) -> int:
    return HEAD_FACTOR * max(1, spec.lpm_width // spec.heads)


class AlfMethod(GradientMethod):
    """Attentive layer fusion as a method."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> AlfSpec:
        """Return the spec of resolved settings."""
        # The statistics of tapped blocks come after those of all blocks, whose positions they do not change.
        found = segments(lpm.depth, lpm.width, lpm.mlp_width or 0, lpm.has_class_token, ())
        vectors = output_vectors(found, lpm.width)
        return AlfSpec(
            classes=classes,
            task=settings.data.task,
            lpm_width=lpm.width,
            vectors=vectors,
            heads=len(vectors),
            dropout=settings.methods.alf.dropout,
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build the network of a spec."""
        return LayerFusion(cast("AlfSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return the numbers of vectors and heads."""
        spec = cast("AlfSpec", spec)
        return (
            ("Fused vectors", f"{len(spec.vectors)}: token statistics of all blocks"),
            ("Attention heads", f"{spec.heads}, dropout {spec.dropout:g}"),
        )


METHOD = AlfMethod()
