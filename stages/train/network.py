"""Fusion and side network together: what stage two trains.

FPT and FPT+ (arXiv 2403.07576, 2408.02426) are one `PromptedSideNetwork`. FPT-X is an `Ensemble`:

    log p = (1 - w) mean_m log softmax(side network m) + w log softmax(linear probe)        up to a constant

a logarithmic opinion pool. An untrained side network says nothing, so that it starts as the probe; each member sees
the same batches but has its own initialisation and dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.results import SideNetworkSpec
from stages.train.cached import Cached
from stages.train.fusion import Fusion, context
from stages.train.side_network import SideNetwork


class PromptedSideNetwork(nn.Module):
    """Logits from a small image and the cached keys and values of the LPM.

    With method "side" there are no prompts and the cached features are not used: the same side network alone.
    """

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.side = SideNetwork(spec)
        self.fusion = None if spec.method == "side" else Fusion(spec)

    @property
    def members(self) -> Sequence[PromptedSideNetwork]:
        """This one."""
        return (self,)

    def member_logits(self, image: torch.Tensor | None, cached: Cached | None = None) -> torch.Tensor:
        """As `forward`, with an axis of one member: (1, B, classes)."""
        return member_logits(self.members, image, cached)

    def advance(
        self, layer: int, tokens: torch.Tensor, gathered: torch.Tensor | None, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens through one side block: draws nothing, so that it can be computed a second time.

        Args:
            layer: Position among the tapped layers, from 0.
            tokens: (B, N, width).
            gathered: By the prompts from the cached tokens, (B, P, D); None without prompts.
            kept: Dropout of the prompts, (B, P, width), or None.
        """
        prompts = None
        if self.fusion is not None and gathered is not None:
            prompts = self.fusion.prompts_from(layer, gathered, kept)
        return self.side.block(layer, tokens, prompts)

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
        return self.join(self.member_logits(image, cached))

    def join(self, logits: torch.Tensor, _pooled: torch.Tensor | None = None) -> torch.Tensor:
        """(1, B, classes) of `member_logits` -> (B, classes)."""
        return logits[0]

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine, whatever else draws."""
        if self.fusion is not None:
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            self.fusion.dropout.generator = torch.Generator(self.fusion.prompts.device).manual_seed(seed)


class LinearProbe(nn.Module):
    """Logistic regression on the LPM's pooled outputs. Fitted, not trained: no gradient reaches it."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        for name, shape in {"weight": (classes, width), "bias": (classes,), "mean": (width,)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, 2, D) -> logits (B, classes)."""
        return (pooled.flatten(1) - self.mean) / self.scale @ self.weight.T + self.bias


class Ensemble(nn.Module):
    """Side networks that read the cached tokens together, and a linear probe."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.networks = nn.ModuleList(PromptedSideNetwork(spec) for _ in range(spec.members))
        self.probe = LinearProbe(2 * spec.lpm_width, spec.classes) if spec.probe_weight else None

    @property
    def members(self) -> Sequence[PromptedSideNetwork]:
        """The side networks, each with its prompts."""
        return tuple(self.networks)  # type: ignore[arg-type]

    def member_logits(self, image: torch.Tensor | None, cached: Cached | None = None) -> torch.Tensor:
        """Logits of each member by itself, (M, B, classes)."""
        return member_logits(self.members, image, cached)

    def forward(
        self, image: torch.Tensor, cached: Cached | None = None, pooled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one batch.

        Args:
            image: (B, 3, S, S), normalised.
            cached: Keys and values in the type of the store; may be None without prompts.
            pooled: (B, 2, D); may be None without a probe.

        Returns:
            Log-probabilities up to a constant of each image, (B, classes).
        """
        return self.join(self.member_logits(image, cached), pooled)

    def join(self, logits: torch.Tensor, pooled: torch.Tensor | None = None) -> torch.Tensor:
        """(M, B, classes) of `member_logits` and (B, 2, D) -> (B, classes), the opinion pool."""
        pool = logits.log_softmax(dim=-1).mean(dim=0)
        if self.probe is None:
            return pool
        if pooled is None:
            raise ValueError("the linear probe needs the pooled outputs")
        weight = self.spec.probe_weight
        joined: torch.Tensor = (1 - weight) * pool + weight * self.probe(pooled).log_softmax(dim=-1)
        return joined

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine, each member in its own way."""
        for position, member in enumerate(self.members):
            member.reseed(*entropy, position)


def build_network(spec: SideNetworkSpec) -> PromptedSideNetwork | Ensemble:
    """What the spec describes, with random weights."""
    return Ensemble(spec) if spec.members > 1 or spec.probe_weight else PromptedSideNetwork(spec)


def member_logits(
    networks: Sequence[PromptedSideNetwork],
    image: torch.Tensor | Callable[[], torch.Tensor] | None,
    cached: Cached | None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Logits of networks of one spec, (M, B, classes).

    The prompts of all networks attend to the cached tokens at once: those are read and widened once for all.

    Args:
        networks: M of them.
        image: (B, 3, S, S), normalised; for checkpointing a function that gives it, which is called again then.
        cached: Keys and values in the type of the store; may be None without prompts.
        checkpointing: Keep for the backward pass what goes into a side block alone, and compute the block again then.
            What the prompts gathered from the cached tokens is kept too: those are not read a third time.
    """
    if image is None:
        raise ValueError("side networks need the small image")
    tokens = _embed(networks, image)
    for layer in range(networks[0].spec.layers):
        found = _mixed(networks, layer, cached)
        tokens = [
            _advance(network, layer, own, mixed, checkpointing)
            for network, own, mixed in zip(networks, tokens, found, strict=True)
        ]
    return torch.stack([network.side.classify(own) for network, own in zip(networks, tokens, strict=True)])


def _embed(
    networks: Sequence[PromptedSideNetwork], image: torch.Tensor | Callable[[], torch.Tensor]
) -> list[torch.Tensor]:
    if isinstance(image, torch.Tensor):
        return [network.side.embed(image) for network in networks]

    def embed() -> list[torch.Tensor]:
        pixels = image()
        return [network.side.embed(pixels) for network in networks]

    # The backward pass of the first layer reads the image, in floats four times as large as it was read.
    again: list[torch.Tensor] = checkpoint(embed, use_reentrant=False, preserve_rng_state=False)
    return again


def _advance(
    network: PromptedSideNetwork, layer: int, tokens: torch.Tensor, mixed: torch.Tensor | None, checkpointing: bool
) -> torch.Tensor:
    gathered, kept = None, None
    if network.fusion is not None and mixed is not None:
        gathered = network.fusion.gathered(layer, mixed)
        kept = network.fusion.draw_kept(gathered)
    if not checkpointing:
        return network.advance(layer, tokens, gathered, kept)
    again: torch.Tensor = checkpoint(
        network.advance, layer, tokens, gathered, kept, use_reentrant=False, preserve_rng_state=False
    )
    return again


def _mixed(networks: Sequence[PromptedSideNetwork], layer: int, cached: Cached | None) -> Sequence[torch.Tensor | None]:
    """What the prompts of each network found in the cached tokens of a layer, (B, P, D); None without prompts."""
    fusions = [network.fusion for network in networks if network.fusion is not None]
    if not fusions:
        return [None] * len(networks)
    if cached is None:
        raise ValueError(f"method {networks[0].spec.method} needs keys and values")
    mixed = context(torch.cat([fusion.queries(layer) for fusion in fusions]), cached.layer(layer))
    shares: Sequence[torch.Tensor] = mixed.split(networks[0].spec.prompts, dim=1)  # type: ignore[no-untyped-call]
    return shares


def learnable_parameters(network: nn.Module) -> int:
    """Number of parameters that training changes, the coefficients of a linear probe included."""
    learned = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    probe = getattr(network, "probe", None)
    return learned if probe is None else learned + probe.weight.numel() + probe.bias.numel()
