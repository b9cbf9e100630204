"""Fusion and side network together: what stage two trains.

FPT and FPT+ (arXiv 2403.07576, 2408.02426) are one `PromptedSideNetwork`. FPT-X is an `Ensemble`:

    log p = (1 - a - w) s_1 mean_m log softmax(side network m)
          + a s_2 mean_n log softmax(attentive probe n) + w s_3 log p(linear probes)   up to a constant

a logarithmic opinion pool of experts, the factors s from `stages.methods.calibration`, the linear probes from
`stages.methods.statistics`. An untrained side network says nothing, so that it starts as the linear probes; each member
sees the same batches but has its own initialisation and dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.resolve import attentive_spec
from schemas.results import SideNetworkSpec
from stages.methods.attentive import AttentiveProbe
from stages.methods.cached_tokens import Cached
from stages.methods.calibration import sharpness
from stages.methods.fusion import Fusion
from stages.methods.joint_attention import SingleExpert, member_logits
from stages.methods.probes import required
from stages.methods.side_network import SideNetwork
from stages.methods.statistics import EvidenceProbe, describe
from stages.scores import log_pool_terms


class PromptedSideNetwork(SingleExpert):
    """Logits from a small image and the cached keys and values of the LPM.

    With method "side" there are no prompts and the cached features are not used: the same side network alone.
    """

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.side = SideNetwork(spec)
        self.fusion = None if spec.method == "side" else Fusion(spec)

    @property
    def depth(self) -> int:
        """Tapped layers, each with a block."""
        return self.spec.layers

    def begin(self, image: torch.Tensor | None) -> torch.Tensor:
        """Tokens (B, N, width) of (B, 3, S, S) normalised pixels."""
        if image is None:
            raise ValueError("side networks need the small image")
        return self.side.embed(image)

    def asks(self, layer: int) -> torch.Tensor | None:
        """Queries of the prompts of a layer, (P, D); None without prompts."""
        return None if self.fusion is None else self.fusion.queries(layer)

    def advance(
        self, layer: int, state: torch.Tensor, mixed: torch.Tensor | None, checkpointing: bool = False
    ) -> torch.Tensor:
        """Tokens after a block, with the prompts made of the answer (B, P, D) of the cached tokens.

        What the prompts gathered from the cached tokens is kept even with checkpointing: those are not read again.
        """
        gathered, kept = None, None
        if self.fusion is not None and mixed is not None:
            gathered = self.fusion.gathered(layer, mixed)
            kept = self.fusion.draw_kept(gathered)
        if not checkpointing:
            return self._block(layer, state, gathered, kept)
        again: torch.Tensor = checkpoint(
            self._block, layer, state, gathered, kept, use_reentrant=False, preserve_rng_state=False
        )
        return again

    def _block(
        self, layer: int, tokens: torch.Tensor, gathered: torch.Tensor | None, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens (B, N, width) through one side block: draws nothing, so that it can be computed a second time."""
        prompts = None
        if self.fusion is not None and gathered is not None:
            prompts = self.fusion.prompts_from(layer, gathered, kept)
        return self.side.block(layer, tokens, prompts)

    def finish(self, state: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) from the tokens after the last block."""
        return self.side.classify(state)

    def forward(
        self, image: torch.Tensor, cached: Cached | None = None, _pooled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one batch.

        Args:
            image: (B, 3, S, S), normalised.
            cached: Keys and values in the type of the store; may be None for method "side".

        Returns:
            Logits (B, classes).
        """
        return self.join(member_logits(self.members, image, cached))

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine, whatever else draws."""
        if self.fusion is not None:
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            self.fusion.dropout.generator = torch.Generator(self.fusion.prompts.device).manual_seed(seed)


class Ensemble(nn.Module):
    """Side networks and attentive probes that read the cached tokens together, and linear probes."""

    shares: torch.Tensor
    sharpness: torch.Tensor

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.networks = nn.ModuleList(PromptedSideNetwork(spec) for _ in range(spec.members))
        self.attentive = nn.ModuleList(AttentiveProbe(attentive_spec(spec)) for _ in range(spec.attentive))
        self.probe: EvidenceProbe | None = None
        if spec.probe_weight:
            self.probe = EvidenceProbe(spec.sources, 2 * spec.lpm_width, spec.classes, spec.task)
        shares = (spec.side_weight, spec.attentive_weight, spec.probe_weight)
        self.register_buffer("shares", torch.tensor([share for share in shares if share]), persistent=False)
        self.register_buffer("sharpness", torch.ones(len(self.shares)))

    @property
    def members(self) -> Sequence[PromptedSideNetwork | AttentiveProbe]:
        """The side networks, each with its prompts, then the attentive probes."""
        return (*self.networks, *self.attentive)

    @property
    def kinds(self) -> int:
        """Experts: side networks, attentive probes, linear probe, as far as there are any."""
        return len(self.shares)

    def forward(
        self, image: torch.Tensor, cached: Cached | None = None, pooled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one batch.

        Args:
            image: (B, 3, S, S), normalised.
            cached: Keys and values in the type of the store; may be None without prompts.
            pooled: (B, 2, D); may be None without linear probes.

        Returns:
            Log-probabilities up to a constant of each image, (B, classes).
        """
        probed = None if self.probe is None else self.probe(describe(required(pooled), cached))
        return self.join(member_logits(self.members, image, cached), probed)

    def join(self, logits: torch.Tensor, probed: torch.Tensor | None = None) -> torch.Tensor:
        """(M, B, classes) of `member_logits`, (B, classes) of the linear probes -> (B, classes), the opinion pool."""
        return self._pool(self.experts(logits, probed))

    def experts(self, logits: torch.Tensor, probed: torch.Tensor | None = None) -> torch.Tensor:
        """What the pool averages: as for `join` -> (B, experts, classes)."""
        said = log_pool_terms(logits, self.spec.task)
        terms = [part.mean(dim=0) for part in (said[: self.spec.members], said[self.spec.members :]) if len(part)]
        if self.probe is not None:
            if probed is None:
                raise ValueError("what the linear probes say is missing")
            terms.append(log_pool_terms(probed, self.spec.task))
        return torch.stack(terms, dim=1)

    def settle(
        self, experts: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take the certainty of each expert from validation images.

        Args:
            experts: (n, experts, classes), on the CPU.
            labels: (n,).
            class_weights: Of the loss.

        Returns:
            The opinion pool (n, classes).
        """
        self.sharpness.copy_(sharpness(experts, labels, self.spec.task, class_weights))
        return self._pool(experts)

    def _pool(self, experts: torch.Tensor) -> torch.Tensor:
        weights = (self.shares * self.sharpness).to(experts.device)
        return (experts * weights[:, None]).sum(dim=1)

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine, each member in its own way."""
        for position, member in enumerate(self.members):
            member.reseed(*entropy, position)


def build_network(spec: SideNetworkSpec) -> PromptedSideNetwork | Ensemble:
    """What the spec describes, with random weights."""
    several = spec.members > 1 or spec.attentive or spec.probe_weight
    return Ensemble(spec) if several else PromptedSideNetwork(spec)


def learnable_parameters(network: nn.Module) -> int:
    """Number of parameters that training changes, the coefficients of linear probes included."""
    learned = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    probe = getattr(network, "probe", None)
    return learned if probe is None else learned + probe.weight.numel() + probe.bias.numel()
