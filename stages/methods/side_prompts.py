"""Candidate prompts among the tokens of side networks: what forward-only adaptation searches there (translation).

FOA (Niu et al. 2024) puts its prompts into the LPM. Here they stand behind the class token of the side network, which
is the part that runs per candidate: the cached tokens are read, and attended to, once per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.methods.batch import Batch, required
from stages.methods.joint_attention import Member, PromptedMember, TokenNetwork, contexts_of

PROMPTS = 3
"""Prompts of a candidate, as published for the LPM."""


@dataclass(frozen=True)
class SideState:
    """A batch before its first pass through the side networks."""

    begun: Sequence[Any]
    """State of each member before the first layer."""
    contexts: Sequence[Sequence[torch.Tensor | None]]
    """Of each layer, the context (B, P, D) of each member's queries."""
    probed: torch.Tensor | None
    """(B, F) that linear probes read; None without them."""


class SidePrompts:
    """Side networks of a model, with candidate prompts of theirs."""

    def __init__(self, network: TokenNetwork) -> None:
        """Take the members of a network, at least one of which takes prompts."""
        self._network = network
        members: Sequence[Any] = network.members
        self._members: Sequence[Member] = members
        self._prompted: Sequence[PromptedMember | None] = [one if one.prompt_width else None for one in members]
        self._widths = [PROMPTS * member.prompt_width for member in self._members]

    @property
    def numbers(self) -> int:
        """Numbers of a candidate: three prompts for each side network."""
        return sum(self._widths)

    def begin(self, batch: Batch) -> SideState:
        """Embed the small images of a prepared batch, and let all queries attend to its cached tokens."""
        queries = [[member.layer_queries(layer) for member in self._members] for layer in range(self._depth)]
        contexts = [contexts_of(each, layer, batch.tokens, False) for layer, each in enumerate(queries)]
        side = batch.side if batch.side is None or isinstance(batch.side, torch.Tensor) else batch.side()
        begun = [member.begin(required(side, "side")) for member in self._members]
        return SideState(begun, contexts, self._network.probe_inputs(batch))

    def run(self, state: SideState, candidate: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass a batch through all members once.

        Args:
            state: From `begin`.
            candidate: (numbers,) prompts of all side networks one after the other; None: no prompts.

        Returns:
            Activations (B, A) of the class token: of each side network, after each block and the norm that comes next;
            and `head_inputs` (B, F) of the model.
        """
        activations, vectors = [], []
        parts = [None] * len(self._members) if candidate is None else candidate.split(self._widths)  # type: ignore[no-untyped-call]
        for at, (member, prompts) in enumerate(zip(self._members, parts, strict=True)):
            tokens, prompted = state.begun[at], self._prompted[at]
            if prompts is not None and prompted is not None:
                tokens = prompted.insert(tokens, prompts.view(PROMPTS, member.prompt_width))
            for layer in range(self._depth):
                tokens = member.advance(layer, tokens, state.contexts[layer][at], False)
                if prompted is not None:
                    activations.append(prompted.activation(layer, tokens))
            vectors.append(member.head_vector(tokens))
        if state.probed is not None:
            vectors.append(state.probed)
        return torch.cat(activations, dim=1), torch.cat(vectors, dim=1)

    @property
    def _depth(self) -> int:
        return self._members[0].depth
