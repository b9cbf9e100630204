"""What travels of a model, its digest, and the mean over sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from schemas.errors import TrainingError
from stages.train.leg import digest_of

State = dict[str, torch.Tensor]
"""Tensors by name, on the CPU."""


def travelling(network: nn.Module) -> tuple[str, ...]:
    """Return the names in the state of a new network that travel: all but the parameters that are never trained.

    Called before the first epoch: some methods switch parameters on and off in the course of a training.
    """
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    return tuple(name for name in network.state_dict() if name not in frozen)


def state_of(network: nn.Module, names: Sequence[str]) -> State:
    """Return a copy of some of the weights of a network."""
    state = network.state_dict()
    return {name: state[name].detach().cpu().clone() for name in names}


def constants_digest(network: nn.Module) -> str:
    """Return the digest of what is saved of a new network and does not travel: equal seeds draw it at every site."""
    travel = set(travelling(network))
    return digest_of({name: value for name, value in network.state_dict().items() if name not in travel})


def bytes_of(state: Mapping[str, torch.Tensor]) -> int:
    """Return the size of tensors, in bytes."""
    return sum(value.numel() * value.element_size() for value in state.values())


def weighted_mean(states: Sequence[State], counts: Sequence[int]) -> State:
    """Return the mean of states weighted by examples, sum_k n_k state_k / sum_k n_k, added up in float64.

    Of a single state, and of equal states, it is that state exactly.

    Args:
        states: One per site, with the same names and shapes.
        counts: Examples of each site.

    Raises:
        TrainingError: If there is no example, or tensors of whole numbers differ, which have no mean.
    """
    total = sum(counts)
    if total <= 0:
        raise TrainingError("No site has training images.", repair="Check the sites of the manifest.")
    mean: State = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            if any(not torch.equal(first, state[name]) for state in states):
                raise TrainingError(f"{name} has whole numbers that differ between sites.")
            mean[name] = first.clone()
            continue
        summed = torch.zeros(first.shape, dtype=torch.float64)
        for state, count in zip(states, counts, strict=True):
            # Products of float32 weights and counts are exact in float64.
            summed += state[name].double() * count
        mean[name] = (summed / total).to(first.dtype)
    return mean


def spoiled(state: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a tensor that is missing, has another shape or type, or is not finite; None: there is none.

    Buffers that were not finite before may stay so: ensembles have NaN for what is not known.
    """
    for name, before in start.items():
        after = state.get(name)
        if after is None or after.shape != before.shape or after.dtype != before.dtype:
            return name
        if before.is_floating_point() and bool(torch.isfinite(before).all()) and not torch.isfinite(after).all():
            return name
    return None
