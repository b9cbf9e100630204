"""What reads the cached tokens together: each member asks its own queries of a layer, one attention answers all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.methods.cached_tokens import Cached
from stages.methods.fusion import context


class Member(Protocol):
    """A network that goes through the tapped layers one by one."""

    @property
    def depth(self) -> int:
        """Tapped layers."""

    def begin(self, image: torch.Tensor | None, /) -> Any:
        """Its state before the first layer, from (B, 3, S, S) normalised pixels, where it looks at them."""

    def asks(self, layer: int, /) -> torch.Tensor | None:
        """What it asks the cached tokens of a layer, (P, D); None: nothing."""

    def advance(self, layer: int, state: Any, mixed: torch.Tensor | None, checkpointing: bool, /) -> Any:
        """Its state after a layer, whose tokens answered (B, P, D), the `context` of its queries.

        With checkpointing only what goes into the layer is kept, and the rest is computed again for the backward pass.
        """

    def finish(self, state: Any, /) -> torch.Tensor:
        """Logits (B, classes), from the state after the last layer."""

    def reseed(self, *entropy: int) -> None:
        """Draw whatever is random in training from here on as these numbers determine."""


class SingleExpert(nn.Module):
    """A network of one member: nothing to average, nothing to fit on validation images."""

    kinds = 1
    """Experts."""

    @property
    def members(self) -> tuple[Self]:
        """This one."""
        return (self,)

    def join(self, logits: torch.Tensor, _probed: torch.Tensor | None = None) -> torch.Tensor:
        """(1, B, classes) of `member_logits` -> (B, classes)."""
        return logits[0]

    def experts(self, logits: torch.Tensor, _probed: torch.Tensor | None = None) -> torch.Tensor:
        """(1, B, classes) of `member_logits` -> (B, 1, classes)."""
        return logits.transpose(0, 1)

    def settle(
        self, experts: torch.Tensor, _labels: torch.Tensor, _class_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n, 1, classes) of `experts` -> (n, classes)."""
        return experts[:, 0]


def member_logits(
    members: Sequence[Member],
    image: torch.Tensor | Callable[[], torch.Tensor] | None,
    cached: Cached | None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Logits of members of the same layers and classes, each by itself.

    The queries of all attend to the cached tokens at once: those are read and widened once for all.

    Args:
        members: At least one.
        image: (B, 3, S, S), normalised; for checkpointing a function that gives it, which is called again then; may be
            None where no member looks at it.
        cached: Keys and values in the type of the store; may be None where no member asks.
        checkpointing: Compute the layers again in the backward pass rather than keep them.

    Returns:
        (members, B, classes).
    """
    states = _begin(members, image)
    for layer in range(members[0].depth):
        answers = _answers([member.asks(layer) for member in members], layer, cached, not checkpointing)
        states = [
            member.advance(layer, state, mixed, checkpointing)
            for member, state, mixed in zip(members, states, answers, strict=True)
        ]
    return torch.stack([member.finish(state) for member, state in zip(members, states, strict=True)])


def _begin(members: Sequence[Member], image: torch.Tensor | Callable[[], torch.Tensor] | None) -> list[Any]:
    if image is None or isinstance(image, torch.Tensor):
        return [member.begin(image) for member in members]

    def begin() -> list[Any]:
        pixels = image()
        return [member.begin(pixels) for member in members]

    # The backward pass of the first layer reads the image, in floats four times as large as it was read.
    again: list[Any] = checkpoint(begin, use_reentrant=False, preserve_rng_state=False)
    return again


def _answers(
    asked: Sequence[torch.Tensor | None], layer: int, cached: Cached | None, keep: bool
) -> Sequence[torch.Tensor | None]:
    queries = [query for query in asked if query is not None]
    if not queries:
        return asked
    if cached is None:
        raise ValueError("keys and values are needed")
    mixed = context(torch.cat(queries), cached.layer(layer), keep)
    parts = iter(mixed.split([len(query) for query in queries], dim=1))  # type: ignore[no-untyped-call]
    return [None if query is None else next(parts) for query in asked]
