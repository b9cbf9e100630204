"""FPT and FPT+ (arXiv 2403.07576, 2408.02426): a side network whose prompts read the cached tokens of the LPM.

`stages.methods.reference` has the same forward pass in a few plain lines.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.specs import SideNetworkSpec
from stages.methods.fusion import Fusion
from stages.methods.joint_attention import TokenNetwork
from stages.methods.side_network import SideNetwork


class PromptedSideNetwork(TokenNetwork):
    """A side network with prompts that gather context from the cached keys and values of the LPM.

    With method "side" it has no prompts and reads only the small image.
    """

    spec: SideNetworkSpec

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.side = SideNetwork(spec)
        self.fusion = Fusion(spec) if spec.reads_tokens else None

    @property
    def depth(self) -> int:
        """Tapped layers, each with a block."""
        return self.spec.layers

    def begin(self, image: torch.Tensor | None) -> torch.Tensor:
        """Return tokens (B, N, width) of normalised pixels (B, 3, s, s)."""
        if image is None:
            raise ValueError("this model needs the input side")
        return self.side.embed(image)

    def layer_queries(self, layer: int) -> torch.Tensor | None:
        """Return the queries (P, D) of the prompts of a layer; None without prompts."""
        return None if self.fusion is None else self.fusion.queries(layer)

    def advance(
        self, layer: int, state: torch.Tensor, mixed: torch.Tensor | None, checkpointing: bool = False
    ) -> torch.Tensor:
        """Return the tokens after a block, with prompts made of the context (B, P, D) of their queries.

        The context is kept even with checkpointing: the cached tokens are read only once.
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
        """Pass tokens (B, N, width) through a side block. Nothing is random: it can be computed a second time."""
        prompts = None
        if self.fusion is not None and gathered is not None:
            prompts = self.fusion.prompts_from(layer, gathered, kept)
        return self.side.block(layer, tokens, prompts)

    def finish(self, state: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) from the tokens after the last block."""
        return self.side.classify(state)

    @property
    def head_width(self) -> int:
        """Width of the class token."""
        return self.spec.width

    def head_vector(self, state: torch.Tensor) -> torch.Tensor:
        """Return the normalised class token (B, width) from the tokens after the last block."""
        return self.side.pooled(state)

    def vector_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) of normalised class tokens."""
        logits: torch.Tensor = self.side.head(vectors)
        return logits

    @property
    def prompt_width(self) -> int:
        """Width of the tokens of the side network."""
        return self.spec.width

    def insert(self, state: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Insert prompts (m, width) behind the class token; they pass through all blocks."""
        return torch.cat([state[:, :1], prompts.to(state.dtype).expand(len(state), -1, -1), state[:, 1:]], dim=1)

    def activation(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Return the class token (B, width) after a block, through the first norm of the next one or the final norm."""
        return self.side.normed_class_token(layer, state)

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine, whatever else draws random numbers."""
        if self.fusion is not None:
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            self.fusion.dropout.generator = torch.Generator(self.fusion.prompts.device).manual_seed(seed)

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """Yield the side blocks.

        Only they are worth it: attention to the cached tokens has a backward pass of its own, which would break the
        graph, and is a few matrix products that leave nothing to fuse.
        """
        yield from self.side.blocks

    def set_micro_batch(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Draw the dropout of the complete batch, and use that of some rows."""
        if self.fusion is not None:
            self.fusion.dropout.draw_part(rows, batch_rows, again=again)
