"""Joint attention: members with queries of their own read the cached tokens of a layer in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from schemas.resolve import SIDE_PATCH
from schemas.specs import MethodSpec
from stages.methods.base import Network
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fusion import context
from stages.methods.positions import resample_embeddings


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

    @property
    def head_width(self) -> int:
        """Width F of `head_vector`."""

    def head_vector(self, state: Any, /) -> torch.Tensor:
        """Return the vector (B, F) that the head reads, from the state after the last layer."""

    def vector_logits(self, vectors: torch.Tensor, /) -> torch.Tensor:
        """Return logits (B, classes) of `head_vector`."""

    @property
    def prompt_width(self) -> int:
        """Width of the tokens that `PromptedMember.insert` takes; 0: it takes none."""

    def reseed(self, *entropy: int) -> None:
        """Draw whatever is random in training from here on as these numbers determine."""


class PromptedMember(Member, Protocol):
    """A member with tokens of its own, among which prompts can stand."""

    def insert(self, state: Any, prompts: torch.Tensor, /) -> Any:
        """Return the state before the first layer with more tokens (m, width)."""

    def activation(self, layer: int, state: Any, /) -> torch.Tensor:
        """Return the class token (B, width) after a layer and the next norm."""


class TokenNetwork(Network):
    """A network whose members read the cached tokens layer by layer."""

    has_head = True

    def resampled(self, saved: MethodSpec, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Resample the position embeddings of side networks to the size of their small image."""
        return resample_embeddings(state, saved.side_size // SIDE_PATCH, self.spec.side_size // SIDE_PATCH)

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
        states = _advance(members, batch, checkpointing)
        return torch.stack([member.finish(state) for member, state in zip(members, states, strict=True)])

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Compute the vectors that the heads of all members read, side by side (B, F), of a prepared batch."""
        members: Sequence[Any] = self.members
        states = _advance(members, batch)
        return torch.cat([member.head_vector(state) for member, state in zip(members, states, strict=True)], dim=1)

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) from `head_inputs`."""
        return self.join(self.split_logits(vectors))

    def probe_inputs(self, batch: Batch) -> torch.Tensor | None:  # noqa: ARG002
        """Return what `head_inputs` has behind the vectors of the members, (B, F); None by default."""
        return None

    def split_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (M, B, classes) of all members from their vectors side by side."""
        members: Sequence[Any] = self.members
        parts = vectors.split([member.head_width for member in members], dim=1)  # type: ignore[no-untyped-call]
        return torch.stack([member.vector_logits(part) for member, part in zip(members, parts, strict=True)])


def _advance(members: Sequence[Member], batch: Batch, checkpointing: bool = False) -> list[Any]:
    """Return the states of all members after the last layer."""
    states = _begin(members, batch.side)
    for layer in range(members[0].depth):
        queries = [member.layer_queries(layer) for member in members]
        contexts = contexts_of(queries, layer, batch.tokens, not checkpointing)
        states = [
            member.advance(layer, state, context_, checkpointing)
            for member, state, context_ in zip(members, states, contexts, strict=True)
        ]
    return states


def _begin(members: Sequence[Member], side: torch.Tensor | Callable[[], torch.Tensor] | None) -> list[Any]:
    if side is None or isinstance(side, torch.Tensor):
        return [member.begin(side) for member in members]

    def begin() -> list[Any]:
        pixels = side()
        return [member.begin(pixels) for member in members]

    # The backward pass of the first layer reads the image, which takes four times the memory once normalised.
    again: list[Any] = checkpoint(begin, use_reentrant=False, preserve_rng_state=False)
    return again


def contexts_of(
    queries: Sequence[torch.Tensor | None], layer: int, tokens: CachedTokens | None, keep: bool
) -> Sequence[torch.Tensor | None]:
    """Return the context (B, P, D) of each member's queries of a layer; None for a member without queries."""
    given = [query for query in queries if query is not None]
    if not given:
        return queries
    if tokens is None:
        raise ValueError("this model needs the input tokens")
    mixed = context(torch.cat(given), tokens.layer(layer), keep)
    split = iter(mixed.split([len(query) for query in given], dim=1))  # type: ignore[no-untyped-call]
    return [None if query is None else next(split) for query in queries]
