"""Some epochs of a training, from given weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Leg:
    """Some epochs of a training, from given weights: what a site trains between two averages (`stages.federate`).

    The optimiser starts without state, and the weights after the last epoch are kept.
    """

    start: Mapping[str, torch.Tensor]
    """Weights to start from, by name in the state of the network; the others are those of a new network."""
    first: int
    """First epoch, from 1, of `train.epochs`, which determine learning rates and random draws."""
    last: int
    """Last epoch."""
    mu: float = 0.0
    """Weight of half the squared distance to `start` in the loss (FedProx, arXiv 1812.06127); 0: none."""

    @property
    def key(self) -> dict[str, Any]:
        """What identifies it in the key of a run."""
        return {"start": digest_of(self.start), "first": self.first, "last": self.last, "mu": self.mu}


def digest_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) of names and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


Anchor = Sequence[tuple[nn.Parameter, torch.Tensor]]
"""Parameters, each with the weights that it is pulled to."""


def anchor_of(network: nn.Module, leg: Leg | None) -> Anchor:
    """Return the learnable parameters with copies of their weights if the leg pulls them there, else nothing."""
    if leg is None or not leg.mu:
        return ()
    return [(parameter, parameter.detach().clone()) for parameter in network.parameters() if parameter.requires_grad]


def pull(anchor: Anchor, mu: float) -> None:
    """Add the gradients of mu / 2 |w - anchor|^2 to those of the parameters that have any."""
    for parameter, start in anchor:
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=mu)
