"""Taps: keys and values of the important tokens, and hidden tokens, taken while the LPM runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from schemas.features import FeatureSpec
from stages.extract.importance import attend, gather_tokens, select_tokens, token_importance
from stages.lpm.attention import Projected, finish, project, scale_of

MLP_CHUNK = 1024
"""Tokens of an image that go through an MLP at a time, where there are more than twice as many."""

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Tapped:
    """What one layer gives for a batch."""

    keys: torch.Tensor
    """(B, H, T, d), in the model's type."""
    values: torch.Tensor
    """(B, H, T, d)."""
    indices: torch.Tensor
    """(B, H, T) int64: positions among the N tokens, most important first."""


class _AllTaken(Exception):  # noqa: N818  (not an error: it ends a forward pass of which nothing more is needed)
    """All keys and values, and the hidden tokens, are taken."""


class Taps(Generic[Kept]):
    """Context in which every forward pass of the LPM leaves the selected tokens of the tapped layers.

    The attention of a tapped block is computed here, by the model's own projections around one fused kernel, because
    its log-sum-exp makes the importance nearly free. Other blocks run as they are, but for the MLP of very many
    tokens, which takes some at a time. The selection happens at once: queries and unselected tokens are released
    layer by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: FeatureSpec,
        keep: Callable[[Tapped], Kept],
        keep_hidden: Callable[[torch.Tensor], Kept] | None = None,
    ) -> None:
        """Change nothing yet.

        Args:
            model: The LPM.
            spec: What to tap.
            keep: Gives what is kept of a layer until the end of the pass.
            keep_hidden: The same for the tokens (B, N, D) that enter block `spec.hidden`; None: they are not taken.
        """
        self._model, self._spec, self._keep, self._keep_hidden = model, spec, keep, keep_hidden
        self._hidden_block = None if keep_hidden is None else spec.hidden
        self._found: dict[int, Kept] = {}
        self._hidden: list[Kept] = []
        self._stack = ExitStack()

    def __enter__(self) -> Taps[Kept]:
        blocks: Any = self._model.blocks
        for layer in self._spec.layers:
            attention = blocks[layer].attn
            self._replace(attention, self._tapped(layer, attention))
        if self._hidden_block is not None:
            handle = blocks[self._hidden_block].register_forward_pre_hook(self._entering)
            self._stack.callback(handle.remove)
        if self._spec.lpm.tokens > 2 * MLP_CHUNK:
            for block in blocks:
                if isinstance(mlp := getattr(block, "mlp", None), nn.Module):
                    self._replace(mlp, _in_parts(mlp.forward))
        return self

    def _replace(self, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        self._stack.callback(delattr, module, "forward")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._found.clear()
        self._hidden.clear()

    def run(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """One forward pass.

        Args:
            pixels: (B, 3, S, S), normalised.

        Returns:
            The tokens after the final norm, (B, N, D); None where the spec wants no pooled outputs: then the pass
            ends with the last keys and values, or with the hidden tokens of a higher block.
        """
        model: Any = self._model
        try:
            tokens: torch.Tensor = model.forward_features(pixels)
        except _AllTaken:
            return None
        return tokens

    def take(self) -> list[Kept]:
        """What was kept of the tapped layers of the last forward pass, in ascending order; can be taken once."""
        found = [self._found.pop(layer) for layer in self._spec.layers]
        self._found.clear()
        return found

    def take_hidden(self) -> Kept | None:
        """What was kept of the hidden tokens of the last forward pass, once; None: they are not taken."""
        return self._hidden.pop() if self._hidden else None

    def _entering(self, _block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Keep what enters a block: its forward pre-hook."""
        if self._keep_hidden is not None:
            self._hidden[:] = [self._keep_hidden(inputs[0])]
        if not self._spec.pooled and self._hidden_block is not None and self._hidden_block > self._spec.layers[-1]:
            raise _AllTaken

    def _tapped(self, layer: int, attention: nn.Module) -> Callable[..., torch.Tensor]:
        rule, kept = self._spec.importance, self._spec.kept
        scale = scale_of(attention)
        higher = self._hidden_block is not None and self._hidden_block > layer
        last = layer == self._spec.layers[-1] and not self._spec.pooled and not higher

        def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            projected = _in_one_type(project(attention, tokens, *args, **kwargs))
            mixed, lse = (None, None) if last else attend(projected, scale)
            indices = select_tokens(token_importance(projected, scale, rule, lse), kept)
            keys, values = gather_tokens(projected.key, indices), gather_tokens(projected.value, indices)
            self._found[layer] = self._keep(Tapped(keys, values, indices))
            if mixed is None:
                raise _AllTaken
            return finish(attention, mixed, projected.gate)

        return forward


def _in_parts(mlp: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """An MLP sees each token by itself, and its hidden layer is the widest tensor of a forward pass."""

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([mlp(part) for part in torch.split(tokens, MLP_CHUNK, dim=1)], dim=1)

    return forward


def _in_one_type(tokens: Projected) -> Projected:
    """Under autocast a normalised query is float32 again while the value is not; a fused kernel takes one type."""
    kind = tokens.value.dtype
    if tokens.query.dtype == kind == tokens.key.dtype:
        return tokens
    return replace(tokens, query=tokens.query.to(kind), key=tokens.key.to(kind))
