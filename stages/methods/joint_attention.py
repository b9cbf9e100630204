"""Joint attention: members with queries of their own read the cached tokens of a layer in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from stages.methods.base import Network
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fusion import context


class Member(Protocol):
    """A network that goes through the tapped layers one by one."""

    @property
    def depth(self) -> int:
        """Tapped layers."""

    def begin(self, side: torch.Tensor | None, /) -> Any:
        """Return its state before the first layer, from normalised small images (B, 3, s, s) where it reads them."""

    def layer_queries(self, layer: int, /) -> torch.Tensor | None:
        """Return its queries to the cached tokens of a layer, (P, D); None: it has none."""

    def advance(self, layer: int, state: Any, mixed: torch.Tensor | None, checkpointing: bool, /) -> Any:
        """Return its state after a layer, from the `context` (B, P, D) of its queries.

        With checkpointing only the input of the layer is kept, and the rest is computed again in the backward pass.
        """

    def finish(self, state: Any, /) -> torch.Tensor:
        """Return logits (B, classes) from the state after the last layer."""

    def reseed(self, *entropy: int) -> None:
        """Draw whatever is random in training from here on as these numbers determine."""


class TokenNetwork(Network):
    """A network whose members read the cached tokens layer by layer."""

    @staticmethod
    def member_logits(members: Sequence[Member], batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits of members of the same layers and classes, each with its own gradient.

        The queries of all attend to the cached tokens together: those are read and widened once for all.

        Args:
            members: At least one.
            batch: Prepared; images only where a member reads them, tokens only where one queries them.
            checkpointing: Compute the layers again in the backward pass rather than keep them.

        Returns:
            (members, B, classes).
        """
        states = _begin(members, batch.side)
        for layer in range(members[0].depth):
            queries = [member.layer_queries(layer) for member in members]
            contexts = _contexts(queries, layer, batch.tokens, not checkpointing)
            states = [
                member.advance(layer, state, context_, checkpointing)
                for member, state, context_ in zip(members, states, contexts, strict=True)
            ]
        return torch.stack([member.finish(state) for member, state in zip(members, states, strict=True)])


def _begin(members: Sequence[Member], side: torch.Tensor | Callable[[], torch.Tensor] | None) -> list[Any]:
    if side is None or isinstance(side, torch.Tensor):
        return [member.begin(side) for member in members]

    def begin() -> list[Any]:
        pixels = side()
        return [member.begin(pixels) for member in members]

    # The backward pass of the first layer reads the image, which takes four times the memory once normalised.
    again: list[Any] = checkpoint(begin, use_reentrant=False, preserve_rng_state=False)
    return again


def _contexts(
    queries: Sequence[torch.Tensor | None], layer: int, tokens: CachedTokens | None, keep: bool
) -> Sequence[torch.Tensor | None]:
    given = [query for query in queries if query is not None]
    if not given:
        return queries
    if tokens is None:
        raise ValueError("this model needs the input tokens")
    mixed = context(torch.cat(given), tokens.layer(layer), keep)
    split = iter(mixed.split([len(query) for query in given], dim=1))  # type: ignore[no-untyped-call]
    return [None if query is None else next(split) for query in queries]
